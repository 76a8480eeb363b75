"""A first pass over a data set: what is wrong is known before hours of training, not after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.training.data import prepare
from edgevlm.training.data.broken import BrokenSample
from edgevlm.training.data.samples import IMAGE, RawSample, Samples


@dataclass(frozen=True)
class Scan:
    """usable: indices of the samples without fault, int64. lengths: their words, int64, negative
    for those without images, as sampling.order takes them. broken: the others.
    """

    usable: Array
    lengths: Array
    broken: tuple[BrokenSample, ...]


def scan(
    source: Samples, image: str = IMAGE, advance: Callable[[int], None] = lambda number: None
) -> Scan:
    """Read every conversation, and see whether the images are there; nothing is decoded.

    Finds wrong JSON and structure, roles, empty texts, numbers of `<image>`, missing files.
    advance: called with the number of samples that are done.
    """
    usable: list[int] = []
    lengths: list[int] = []
    faults: list[BrokenSample] = []
    for index in range(len(source)):
        try:
            raw = source[index]
            prepare.checked(raw, image)
            prepare.check_files(raw)
        except BrokenSample as bad:
            faults.append(bad)
        else:
            usable.append(index)
            lengths.append(words(raw))
        advance(index + 1)
    return Scan(np.array(usable, np.int64), np.array(lengths, np.int64), tuple(faults))


def words(raw: RawSample) -> int:
    """Words of all turns, cut at blanks; negative without images. The unit of LLaVA's grouping."""
    count = sum(len(text.split()) for _, text in raw.turns)
    return count if raw.images else -count
