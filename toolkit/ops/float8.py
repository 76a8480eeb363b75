"""FP8 as E4M3: a sign, 4 bits of exponent and 3 of mantissa, no infinities (ONNX's FLOAT8E4M3FN).

Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433. The largest value is 448; the
least step is 2^-9, of values below 2^-6; the codes 0x7F and 0xFF are no numbers. Rounding is to
nearest, ties to even, and what is larger than 448 becomes 448, as ONNX's `saturate` and TensorRT
have it.
"""

from __future__ import annotations

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array

LARGEST = 448.0
ROUNDS_TO_LARGEST = 464.0  # the largest number that rounds to 448 by itself
NAN = 0x7F  # of either sign
_EXPONENT = np.uint32(0x7F80_0000)  # of a float32
_LEAST = np.uint32(121 << 23)  # the bits of 2^-6, below which all values have one step
_MANTISSA_BITS = 3


def rounded(x: Array) -> Array:
    """float32 values of E4M3 nearest to x. Raises ValueError for NaN, which has no nearest."""
    size, step, _ = _steps(x)
    return np.asarray(np.copysign(np.rint(size / step) * step, x.astype(np.float32, copy=False)))


def encode(x: Array) -> Array:
    """uint8 codes of `rounded(x)`. Raises ValueError for NaN."""
    size, step, exponent = _steps(x)
    # In a binade, 8 to 16 steps: 16 are the first code of the next one.
    codes = ((exponent - _LEAST) >> np.uint32(23 - _MANTISSA_BITS)).astype(np.uint8)
    codes += np.rint(size / step).astype(np.uint8)
    return np.asarray(codes | (np.signbit(x).astype(np.uint8) << np.uint8(7)))


def decode(codes: Array) -> Array:
    """float32 values of uint8 codes; 0x7F and 0xFF give NaN, which `check` refuses."""
    return np.asarray(_VALUES[codes])


def check(codes: Array) -> None:
    """Raise ValueError for codes that are no numbers."""
    bad = int(np.count_nonzero((codes & np.uint8(NAN)) == NAN))
    if bad:
        raise ValueError(f"{bad} of {codes.size} FP8 codes are NaN (0x7F or 0xFF)")


def _steps(x: Array) -> tuple[Array, Array, Array]:
    """|x| up to 448 in float32, the step of E4M3 there, and the bits of its exponent."""
    size = np.abs(x.astype(np.float32, copy=False))
    if np.isnan(size).any():
        raise ValueError("NaN cannot be rounded to FP8")
    size = np.minimum(size, np.float32(LARGEST))
    exponent = np.maximum(np.asarray(size).view(np.uint32) & _EXPONENT, _LEAST)
    step = (exponent - np.uint32(_MANTISSA_BITS << 23)).view(np.float32)
    return np.asarray(size), step, exponent


def _table() -> Array:
    """The value of every code."""
    codes = np.arange(256, dtype=np.int32)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa, mantissa + 8) * 2.0 ** (np.maximum(exponent, 1) - 10)
    size[(codes & NAN) == NAN] = np.nan
    values: Array = np.where(codes < 128, size, -size).astype(np.float32)
    values.flags.writeable = False
    return values


_VALUES = _table()
