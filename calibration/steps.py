"""Weights in few bits, block by block: the step of a block, and codes rounded to nearest.

The largest weight of a block sets the step of all others. A smaller step clips it and rounds the
others more finely; which of the two costs less is what their inputs say (the clipping of AWQ, Lin
et al., arXiv 2306.00978). Without inputs it does harm: a better fit of the weights alone is no
better model.
"""

from __future__ import annotations

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.blockwise import ZERO_POINT, StorageFormat
from edgevlm.toolkit.quantization.coded import Codes

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a block's range


def widest(weights: Array, storage: StorageFormat) -> tuple[Array, Array]:
    """Scales (float32) and zero points (uint8) of blocks [block, ...] that reach their largest."""
    blocks = np.moveaxis(weights, 0, -1)
    if storage.zero_points:
        return blockwise.ranges_of(blocks, storage.bits)
    scales = blockwise.scales_of(blocks, storage.bits)
    return scales, np.full(scales.shape, ZERO_POINT[storage.bits], np.uint8)


def best(weights: Array, costs: Array, storage: StorageFormat) -> tuple[Array, Array]:
    """The same, with ranges so much smaller that squared errors times `costs` are least.

    costs: of the channels of a block, [block] or more axes of `weights` [block, ...].
    """
    largest, zeros = widest(weights, storage)
    along = costs.reshape(*costs.shape, *[1] * (weights.ndim - costs.ndim))
    found, least = largest, np.full(largest.shape, np.inf, np.float32)
    for shrink in SHRINKS:
        scales = largest * np.float32(shrink)
        change = weights - values(codes(weights, scales, zeros, storage), scales, zeros)
        cost = (along * np.square(change)).sum(0)
        better = cost < least
        found, least = np.where(better, scales, found), np.where(better, cost, least)
    return found, zeros


def codes(weights: Array, scales: Array, zeros: Array, storage: StorageFormat) -> Array:
    """float32 codes of blocks [block, ...], rounded to nearest; zeros: zero points."""
    steps = np.where(scales == 0, np.float32(1), scales)
    shifted = np.rint(weights / steps) + zeros.astype(np.float32)
    return np.asarray(np.clip(shifted, 0, np.float32(2**storage.bits - 1)))


def values(given: Array, scales: Array, zeros: Array) -> Array:
    """The weights that codes [block, ...] stand for."""
    return np.asarray((given - zeros.astype(np.float32)) * scales)


def nearest(matrix: Array, storage: StorageFormat, costs: Array | None = None) -> Codes:
    """A weight [inputs, outputs] rounded to nearest; with `costs` [inputs], in the `best` steps."""
    block = storage.block_in(len(matrix))
    assert block is not None
    blocks = np.asarray(matrix, np.float32).reshape(-1, block, matrix.shape[1]).swapaxes(0, 1)
    if costs is None:
        scales, zeros = widest(blocks, storage)
    else:
        scales, zeros = best(blocks, costs.reshape(-1, block).T, storage)
    found = codes(blocks, scales, zeros, storage).swapaxes(0, 1).reshape(matrix.shape)
    return stored(found, scales, zeros, storage)


def stored(found: Array, scales: Array, zeros: Array, storage: StorageFormat) -> Codes:
    """Codes [inputs, outputs], scales and zero points [blocks, outputs] as a file has them."""
    by_output = _packed(found, storage), np.ascontiguousarray(scales.T)
    return Codes(storage, *by_output, _packed(zeros, storage) if storage.zero_points else None)


def _packed(array: Array, storage: StorageFormat) -> Array:
    rows = np.ascontiguousarray(array.T.astype(np.uint8))
    return rows if storage.bits == 8 else blockwise.pack(rows)
