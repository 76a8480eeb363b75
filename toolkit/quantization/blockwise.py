"""Weights in 8 or 4 bits with one scale per block of inputs, as a weights file stores them.

`NAME.int4` holds [outputs, inputs] unsigned, two values in a byte along the inputs, low half first,
and `NAME.int4.scale` [outputs, inputs / block]: weight = (stored - zero point) * scale, with zero
point 8 or 128. ONNX Runtime's MatMulNBits reads these bytes as they are, and so does ONNX's
DequantizeLinear with UINT4 or UINT8. An embedding table, whose rows are outputs already, is
`NAME.rows_int8`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array

Bits = Literal[8, 4]
BLOCK_SIZES = (128, 64, 32, 16)  # inputs that share a scale: the largest that divides them
ZERO_POINT: dict[Bits, int] = {8: 128, 4: 8}
SCALE = ".scale"
PIECE = 1 << 24  # weights that are rounded at a time


@dataclass(frozen=True)
class StorageFormat:
    """How a weight is stored. transposed: ours is [inputs, outputs], stored [outputs, inputs]."""

    bits: Bits
    transposed: bool
    suffix: str


LINEAR: dict[Bits, StorageFormat] = {
    8: StorageFormat(8, True, ".int8"),
    4: StorageFormat(4, True, ".int4"),
}
TABLE = StorageFormat(8, False, ".rows_int8")
FORMATS = (*LINEAR.values(), TABLE)


def block_of(inputs: int) -> int | None:
    """The block for so many inputs, None where none divides them: the weight stays in float."""
    return next((size for size in BLOCK_SIZES if inputs % size == 0), None)


def quantize(rows: Array, bits: Bits) -> tuple[Array, Array]:
    """Rows [outputs, inputs] rounded to nearest: stored bytes, and scales in float32.

    The value farthest from zero meets the end of the range exactly, which at 4 bits reaches one
    step farther below zero than above: there a scale may be negative.
    """
    outputs, inputs = rows.shape
    block = block_of(inputs)
    if block is None:
        raise ValueError(f"{inputs} inputs are not a multiple of {BLOCK_SIZES[-1]}")
    parts = rows.astype(np.float32).reshape(outputs, inputs // block, block)
    scales = _scales(parts, bits)
    steps = np.where(scales == 0, np.float32(1), scales)
    zero_point = ZERO_POINT[bits]
    codes = np.clip(np.rint(parts / steps[..., None]) + zero_point, 0, 2 * zero_point - 1)
    stored = codes.astype(np.uint8).reshape(outputs, inputs)
    return (stored if bits == 8 else pack(stored)), scales


def _scales(parts: Array, bits: Bits) -> Array:
    if bits == 8:
        return np.asarray(np.abs(parts).max(-1) / np.float32(127))
    farthest = np.abs(parts).argmax(-1)[..., None]
    return np.asarray(np.take_along_axis(parts, farthest, -1)[..., 0] / np.float32(-8))


def dequantize(stored: Array, scales: Array, bits: Bits) -> Array:
    """[outputs, inputs] float32 from what `quantize` gave."""
    codes = stored if bits == 8 else unpack(stored)
    outputs, inputs = codes.shape
    parts = codes.reshape(outputs, scales.shape[1], -1).astype(np.float32) - ZERO_POINT[bits]
    return np.asarray((parts * scales[..., None].astype(np.float32)).reshape(outputs, inputs))


def pack(codes: Array) -> Array:
    """Two values below 16 in a byte, the first in the low half."""
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4))


def unpack(stored: Array) -> Array:
    """The inverse of pack."""
    pairs = np.stack([stored & 15, stored >> 4], -1)
    return pairs.reshape(*stored.shape[:-1], -1)


def pieces(rows: Array, bits: Bits, *, scales: bool) -> Iterator[Array]:
    """`quantize` in pieces of rows: the bytes, or the scales."""
    step = max(PIECE // max(rows.shape[1], 1), 1)
    for start in range(0, rows.shape[0], step):
        yield quantize(rows[start : start + step], bits)[int(scales)]
