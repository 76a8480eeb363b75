"""What a KV cache was computed from, position by position, so that prefixes can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgevlm.engines.serving.image_cache import EncodedImage
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.prompts import PromptSequence

_ROWS = 1 << 32  # of one image, at most


def prompt_key(sequence: PromptSequence, images: Sequence[EncodedImage]) -> Array:
    """int64 [positions]: ids of tokens; where an image's row stands, a negative number that no
    other row of this or another image has.
    """
    ids, rows = sequence.ids[0], sequence.rows[0]
    if not images:
        return np.array(ids, np.int64)
    ends = np.cumsum([image.rows.shape[0] for image in images])
    owner = np.searchsorted(ends, rows, side="right").clip(max=len(images) - 1)
    first = ends - [image.rows.shape[0] for image in images]
    numbers = np.asarray([image.number for image in images], np.int64)
    own = -1 - (numbers[owner] * _ROWS + rows - first[owner])
    return np.asarray(np.where(rows >= 0, own, ids))


def common(a: Array, b: Array) -> int:
    """The positions from the first on in which both are the same."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
