"""A sample ready for a batch: ids and labels in runs, its images prepared, its length known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgevlm.toolkit.images.views import PreparedImage
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.training.data.masking import IGNORED, Runs
from edgevlm.training.data.masks import SampleMasks


@dataclass(frozen=True)
class Sample:
    """One sample. The slot of image k is between run k and run k + 1.

    labels: as the runs, -100 where the token is no target. length: positions in the language
    model, those of images among them, at most the longest allowed. lost: positions beyond that,
    which a batch leaves out.
    """

    name: str
    runs: Runs
    labels: Runs
    images: tuple[PreparedImage, ...]
    length: int
    lost: int = 0
    masks: SampleMasks = SampleMasks()


def image_tokens(image: PreparedImage, tokens_per_view: int) -> int:
    """Positions that an image takes."""
    if image.order is not None:
        return len(image.order.rows)
    return len(image.pixels) * tokens_per_view


def lay_out(
    runs: Runs, labels: Runs, rows: Sequence[Array], limit: int | None
) -> tuple[Array, Array, Array]:
    """Ids, feature rows and labels of the first `limit` positions, each int64 [positions].

    rows: for each image the indices of its feature rows. An id is 0 where an image is, a row -1
    where text is.
    """
    ids, places, targets = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        if number:
            image = np.asarray(rows[number - 1], np.int64)
            ids.append(np.zeros(len(image), np.int64))
            places.append(image)
            targets.append(np.full(len(image), IGNORED, np.int64))
        ids.append(np.asarray(run, np.int64))
        places.append(np.full(len(run), -1, np.int64))
        targets.append(np.asarray(label, np.int64))
    joined = [np.concatenate(parts)[:limit] for parts in (ids, places, targets)]
    return joined[0], joined[1], joined[2]


def scored(labels: Array) -> Array:
    """The positions whose next token is a target, int64."""
    return np.asarray(np.flatnonzero(labels[1:] != IGNORED), np.int64)
