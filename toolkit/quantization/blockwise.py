"""Weight-only quantization: 8 or 4 bits, one scale per block of inputs, and its storage format.

`NAME.int4` holds unsigned codes [outputs, inputs], two in a byte along the inputs, the low half
first; `NAME.int4.scale` holds [outputs, inputs / block]: weight = (code - zero point) * scale, with
zero point 8 or 128. Where blocks have zero points of their own, as AWQ's and some of GPTQ's
checkpoints do, `NAME.int4.zero_point` holds them, [outputs, inputs / block], packed like the codes.
Both ONNX Runtime's MatMulNBits and ONNX's DequantizeLinear (UINT4, UINT8) read these bytes without
conversion. Where blocks are not of neighbouring inputs (GPTQ with desc_act), `NAME.int4.order`
[inputs] names the input of each column of codes. An embedding table, whose rows are outputs, is
`NAME.rows_int8`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array

Bits = Literal[8, 4]
BLOCK_SIZES = (128, 64, 32, 16)  # inputs that share a scale: the largest that divides their number
ZERO_POINT: dict[Bits, int] = {8: 128, 4: 8}
SCALE = ".scale"
ZERO_POINTS = ".zero_point"
ORDER = ".order"
TAILS = (SCALE, ZERO_POINTS, ORDER)  # of the names of what stands beside codes
PIECE = 1 << 24  # weights that are quantized at a time


@dataclass(frozen=True)
class StorageFormat:
    """How a quantized weight is stored.

    transposed: the model's weight is [inputs, outputs], the stored one [outputs, inputs]. block:
    the most inputs that share a scale, None for the largest of BLOCK_SIZES. zero_points: whether
    each block has a zero point of its own. ordered: whether columns are in an order of their own.
    """

    bits: Bits
    transposed: bool
    suffix: str
    block: int | None = None
    zero_points: bool = False
    ordered: bool = False

    def block_in(self, inputs: int) -> int | None:
        """The inputs that share a scale in a weight of so many; None if it stays in float.

        Zero points of 4 bits need an even number of blocks: MatMulNBits begins each row of them in
        a new byte, and DequantizeLinear leaves no gap.
        """
        pairs = self.zero_points and self.bits == 4
        return block_of(inputs // 2 if pairs and inputs % 2 == 0 else inputs, self.block)


LINEAR: dict[Bits, StorageFormat] = {
    8: StorageFormat(8, True, ".int8"),
    4: StorageFormat(4, True, ".int4"),
}
TABLE = StorageFormat(8, False, ".rows_int8")
FORMATS = (*LINEAR.values(), TABLE)


def block_of(inputs: int, most: int | None = None) -> int | None:
    """The largest block size, up to `most`, that divides so many inputs.

    None if none does: the weight stays in float.
    """
    sizes = (size for size in BLOCK_SIZES if most is None or size <= most)
    return next((size for size in sizes if inputs % size == 0), None)


def quantize(rows: Array, bits: Bits, most: int | None = None) -> tuple[Array, Array]:
    """Codes of `rows` [outputs, inputs], rounded to nearest, and scales in float32.

    Codes are uint8, two in a byte at 4 bits. The largest value of a block gets the end of the
    range exactly. At 4 bits the range has one step more below zero than above, so a scale may be
    negative. most: the largest block. Raises ValueError if no block size divides the inputs.
    """
    outputs, inputs = rows.shape
    block = block_of(inputs, most)
    if block is None:
        raise ValueError(f"{inputs} inputs are not a multiple of {BLOCK_SIZES[-1]}")
    blocks = rows.astype(np.float32).reshape(outputs, inputs // block, block)
    scales = scales_of(blocks, bits)
    steps = np.where(scales == 0, np.float32(1), scales)
    zero_point = ZERO_POINT[bits]
    codes = np.clip(np.rint(blocks / steps[..., None]) + zero_point, 0, 2 * zero_point - 1)
    stored = codes.astype(np.uint8).reshape(outputs, inputs)
    return (stored if bits == 8 else pack(stored)), scales


def scales_of(blocks: Array, bits: Bits) -> Array:
    """The scale of each block along the last axis: its largest value gets the end of the range."""
    if bits == 8:
        return np.asarray(np.abs(blocks).max(-1) / np.float32(127))
    farthest = np.abs(blocks).argmax(-1)[..., None]
    return np.asarray(np.take_along_axis(blocks, farthest, -1)[..., 0] / np.float32(-8))


def ranges_of(blocks: Array, bits: Bits) -> tuple[Array, Array]:
    """Scale and zero point (uint8) of each block along the last axis, whose codes reach from its
    least value to its largest, and to zero.
    """
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    scales = np.asarray((high - low) / np.float32(2**bits - 1))
    steps = np.where(scales == 0, np.float32(1), scales)
    return scales, np.rint(-low / steps).astype(np.uint8)


def dequantize(stored: Array, scales: Array, bits: Bits, zero_points: Array | None = None) -> Array:
    """float32 [outputs, inputs] from the codes and scales of `quantize`.

    zero_points: [outputs, blocks], where they are not all 8 or 128.
    """
    codes = stored if bits == 8 else unpack(stored)
    outputs, inputs = codes.shape
    blocks = codes.reshape(outputs, scales.shape[1], -1).astype(np.float32)
    blocks -= ZERO_POINT[bits] if zero_points is None else zero_points[..., None]
    return np.asarray((blocks * scales[..., None].astype(np.float32)).reshape(outputs, inputs))


def inputs_of(columns: Array, order: Array) -> Array:
    """Rows by input from rows whose column i is of input order[i]."""
    rows = np.empty_like(columns)
    rows[:, order] = columns
    return rows


def fixed_zero_points(shape: tuple[int, ...], storage: StorageFormat) -> Array:
    """The zero points of `quantize` for rows of this shape, stored as those that differ are."""
    outputs, inputs = shape
    block = storage.block_in(inputs)
    assert block is not None
    codes = np.full((outputs, inputs // block), ZERO_POINT[storage.bits], np.uint8)
    return codes if storage.bits == 8 else pack(codes)


def pack(codes: Array) -> Array:
    """Two codes below 16 in each byte, the first in the low half."""
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4))


def unpack(stored: Array) -> Array:
    """The inverse of pack."""
    pairs = np.stack([stored & 15, stored >> 4], -1)
    return pairs.reshape(*stored.shape[:-1], -1)


def pieces(rows: Array, bits: Bits, most: int | None = None, *, scales: bool) -> Iterator[Array]:
    """`quantize` in pieces along the rows: the codes, or the scales."""
    step = max(PIECE // max(rows.shape[1], 1), 1)
    for start in range(0, rows.shape[0], step):
        yield quantize(rows[start : start + step], bits, most)[int(scales)]
