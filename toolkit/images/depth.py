"""Pixels of more than eight bits, as integers or floats, scaled to bytes by their range.

The range is what the file declares: the bits per sample, SMinSampleValue and SMaxSampleValue of a
TIFF (TIFF 6.0, sections 8 and 19), the maximum of a PGM. Where nothing is declared, floats within
0..1 are read as 0..1, and everything else is refused: a guess would give a black picture, or one
without contrast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.ops.vocabulary import Array

if TYPE_CHECKING:
    from PIL.Image import Image

BYTES = {"I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2, "I": 4, "F": 4}  # of a pixel in Pillow
MODES = tuple(BYTES)
_BLOCK = 1 << 20  # values that are scaled at once, as floats of eight bytes
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_MIN, _MAX, _SMIN, _SMAX = 280, 281, 340, 341
_SIGNED = 2  # of SampleFormat
_DARK = 16  # 16-bit values whose upper four bits are zero end below this, which looks black
_DECLARE = "save it with 8 bits a channel, or as a TIFF with SMinSampleValue and SMaxSampleValue"
_STRETCH = "scale the values to the full range, or save the image with 8 bits a channel"


@dataclass(frozen=True)
class Depth:
    """What a file states about its pixels, read before they are decoded.

    bits: of a sample, None if unknown. limits: the declared values of black and white. signed:
    whether samples are (Pillow gives unsigned ones of 32 bits as if they were). inverted: white is
    0. sixteen: colours of 16 bits, of which Pillow gives the upper bytes alone.
    """

    bits: int | None = None
    limits: tuple[float, float] | None = None
    signed: bool = False
    inverted: bool = False
    sixteen: bool = False


def declared(file: Image) -> Depth:
    """The depth that an opened, not yet decoded image states."""
    tags = getattr(file, "tag_v2", None)
    if tags is None:
        # Pillow scales a PGM by its maximum to 16 bits, and gives a grey PNG as I or as I;16.
        known = file.mode.startswith("I;16") or file.format in ("PPM", "PNG")
        return Depth(16 if known else None, sixteen=_sixteen(file))
    limits = _limits(tags, _SMIN, _SMAX) or _limits(tags, _MIN, _MAX)
    bits = int(max(_numbers(tags.get(_BITS)), default=1))
    signed = _SIGNED in _numbers(tags.get(_SAMPLE_FORMAT))
    inverted = tags.get(_PHOTOMETRIC) == 0 and file.mode in MODES  # of bytes Pillow does it
    return Depth(bits, limits, signed, inverted, _sixteen(file))


def _sixteen(file: Image) -> bool:
    tile: Any = next(iter(getattr(file, "tile", ())), None)
    arguments = tile[3] if tile else ""
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return file.mode not in MODES and ";16" in str(raw)


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    return [float(v) for v in values]


def _limits(tags: Any, lowest: int, highest: int) -> tuple[float, float] | None:
    """The range that two tags declare; the lower may be absent and is 0 then."""
    low, high = min(_numbers(tags.get(lowest)), default=0.0), _numbers(tags.get(highest))
    return (low, max(high)) if high and low < max(high) < np.inf else None


def check_colours(image: Image, depth: Depth) -> None:
    """Raise InputError for bytes that are not what the file's samples mean."""
    if depth.signed:
        raise InputError(
            f"its samples are signed integers of {depth.bits} bits, which Pillow reads as unsigned",
            hint="save it with unsigned samples",
        )
    if depth.sixteen and np.asarray(image.convert("RGB")).max() < _DARK:
        raise InputError(
            "its colours have 16 bits, but no value reaches 4096 of 65535: it would come out black",
            hint=_STRETCH,
        )


def to_bytes(image: Image, depth: Depth) -> tuple[Array, str]:
    """A grey image of one of MODES as uint8 [height, width], and a note of what was done.

    Raises InputError where the range of its values is not known.
    """
    values = np.asarray(image)
    if values.dtype == np.int32 and depth.bits == 32 and not depth.signed:
        values = values.view(np.uint32)
    if image.mode == "F":
        grey, note = _floats(values, depth)
    elif depth.signed or depth.bits in (None, 32):
        grey, note = _unbounded(values, depth)
    else:
        grey, note = _unsigned(values, depth)
    return (255 - grey if depth.inverted else grey), note


def _unsigned(values: Array, depth: Depth) -> tuple[Array, str]:
    """Unsigned samples of at most 16 bits; a declared maximum of 2^n - 1 says that n are used."""
    bits = depth.bits or 16
    if depth.limits is not None and depth.limits[0] == 0:
        used = int(depth.limits[1]).bit_length()
        if 8 <= used < bits and depth.limits[1] == 2**used - 1 >= values.max():
            bits = used
    grey = (values >> (bits - 8)).astype(np.uint8)
    if values.max() > 0 and grey.max() < _DARK:
        raise InputError(
            f"its grey values have {bits} bits, but none exceeds {values.max()} of {2**bits - 1}: "
            "it would come out black",
            hint=_STRETCH,
        )
    note = f"{bits}-bit grey scaled to 8 bits"
    return grey, note if grey.max() >= 64 else f"{note}; dark: no value exceeds {values.max()}"


def _unbounded(values: Array, depth: Depth) -> tuple[Array, str]:
    """Integers whose type does not tell what is black and what is white."""
    kind = "" if depth.bits is None else f" of {depth.bits} bits"
    if depth.limits is None:
        raise InputError(
            f"its grey values are {'signed ' * depth.signed}integers{kind} from {values.min()} to "
            f"{values.max()}, and nothing says which value is white",
            hint=_DECLARE,
        )
    return _scaled(values, depth.limits)


def _floats(values: Array, depth: Depth) -> tuple[Array, str]:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(values).all():
        raise InputError("some of its float values are not finite", hint=_DECLARE)
    if depth.limits is not None:
        return _scaled(values, depth.limits)
    if low < 0 or high > 1:
        raise InputError(
            f"its grey values are floats from {low:g} to {high:g}, and only 0..1 is read without a "
            "declared range",
            hint=_DECLARE,
        )
    grey, _ = _scaled(values, (0, 1))
    return grey, f"float grey from {low:g} to {high:g}, read as 0..1, scaled to 8 bits"


def _scaled(values: Array, limits: tuple[float, float]) -> tuple[Array, str]:
    low, high = limits
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, _BLOCK // values.shape[1])
    for first in range(0, len(values), rows):
        block = values[first : first + rows]
        wide = block.astype(np.int64) if block.dtype.kind in "iu" else block
        scaled = np.clip((wide - low) * (255 / (high - low)), 0, 255)
        grey[first : first + rows] = np.rint(scaled).astype(np.uint8)
    return grey, f"grey of the declared range {low:g} to {high:g} scaled to 8 bits"
