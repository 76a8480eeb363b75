"""A weight in pieces: a large one is never in memory a second time as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array

_PIECE = 1 << 24  # weights at a time


def row_pieces(weight: Array) -> Iterator[Array]:
    """float32 [some inputs, outputs] of a `weight` [inputs, outputs], in order."""
    step = max(_PIECE // max(weight.shape[1], 1), 1)
    for start in range(0, weight.shape[0], step):
        yield weight[start : start + step].astype(np.float32)


def largest_by_output(weight: Array) -> Array:
    """float32 [outputs]: the largest |w| of each output of a `weight` [inputs, outputs]."""
    largest = np.zeros(weight.shape[1], np.float32)
    for rows in row_pieces(weight):
        np.maximum(largest, np.abs(rows).max(0), out=largest)
    return largest
