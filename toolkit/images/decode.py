"""From image files to RGB: which formats are read, what is done to unusual files, what is refused.

`LoadedImage.notes` states what was done.
"""

from __future__ import annotations

import stat
import struct
import warnings
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.images import depth
from edgevlm.toolkit.ops.vocabulary import Array

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000  # a 30000 x 30000 image would take 2.7 GB decoded
MAX_SIDE = 16_384  # padding to a square of this side already takes 0.8 GB
MAX_RATIO = 200  # beyond this, resizing the short edge makes an image of hundreds of megapixels
# Formats of pixels only. Pillow knows more: for PostScript it starts a program (Ghostscript),
# and of others it reads a part or needs a handler. MPO, of phones, is opened as JPEG.
FORMATS = (
    "JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "ICO", "PCX", "QOI", "SGI",
    "TGA",
)  # fmt: skip
_ORIENTATION = 0x0112  # the EXIF tag
# Formats whose header states the number of frames. In a GIF or TIFF they could only be counted by
# going through all: a TIFF of 2 MB may have 16000, and Pillow's time grows with their square.
_COUNTED = ("PNG", "WEBP", "AVIF")
# First bytes of what is refused by name.
_REFUSED_FORMATS = (
    (b"%!PS", "PostScript"), (b"\xc5\xd0\xd3\xc6", "PostScript"), (b"%PDF", "PDF"),
    (b"8BPS", "a Photoshop file"), (b"SIMPLE  =", "FITS"), (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"\x89HDF", "HDF5"), (b"GRIB", "GRIB"), (b"BUFR", "BUFR"), (b"<svg", "SVG"),
    (b"<?xml", "XML, such as SVG"), (b"icns", "ICNS"), (b"DDS ", "DDS"), (b"PF\n", "a colour PFM"),
)  # fmt: skip
_CONVERTED = {"CMYK": "CMYK", "P": "palette", "PA": "palette", "YCbCr": "YCbCr", "HSV": "HSV"}
_DIRECT = ("1", "L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX")
_BY_HAND = "convert it with another program: to PNG, or JPEG"

ImageSource: TypeAlias = "str | PathLike[str] | bytes | bytearray | Image | Array"


@dataclass(frozen=True)
class LoadedImage:
    """A decoded RGB image; `notes` states what was done to get it."""

    rgb: Image
    notes: tuple[str, ...] = ()


def load(source: ImageSource, *, upright: bool = True) -> LoadedImage:
    """Decode a file, its bytes, a PIL image or a uint8 array to RGB. Raises InputError.

    Orientation from EXIF is applied if `upright`, transparency dropped, CMYK and palettes are
    converted, deep and float greys scaled to 8 bits by their range; an animation gives its first
    frame. Arrays are [height, width] or [height, width, 3 or 4], RGB.
    """
    from PIL import Image, UnidentifiedImageError

    name = str(source) if isinstance(source, (str, PathLike)) else "given in memory"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns where we refuse
            if isinstance(source, (Image.Image, np.ndarray)):
                return _given(source, name, upright)
            if isinstance(source, (str, PathLike)):
                _refuse_devices(Path(source), name)
            file = source if isinstance(source, (str, PathLike)) else BytesIO(source)
            _refuse_large_icons(source, name)
            with Image.open(file, formats=_formats()) as opened:
                _refuse_odd_sizes(opened.size, name)
                loaded = _to_rgb(opened, name, upright)
                _refuse_odd_sizes(loaded.rgb.size, name)  # decoders may find another size inside
                return loaded
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"image {name:.300} does not exist", hint=_if_address(name)) from None
    except IsADirectoryError:
        raise InputError(f"image {name} is a folder") from None
    except (UnidentifiedImageError, Image.DecompressionBombError) as refused:
        raise _unreadable(source, name, refused) from None
    except Exception as broken:  # a damaged file makes Pillow's decoders raise anything
        stated = getattr(broken, "strerror", None) or str(broken)  # strerror: without the name
        reason = stated or type(broken).__name__
        raise InputError(
            f"image {name:.300} cannot be decoded: {reason}", hint=_if_address(name)
        ) from None


def size_of(file: bytes) -> tuple[int, int]:
    """Width and height as a file states them: nothing is decoded. Raises InputError."""
    from PIL import Image

    name = "given in memory"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _refuse_large_icons(file, name)
            with Image.open(BytesIO(file), formats=_formats()) as opened:
                width, height = opened.size
                return int(width), int(height)
    except InputError:
        raise
    except Exception as refused:  # as in `load`
        raise _unreadable(file, name, refused) from None


def _refuse_devices(path: Path, name: str) -> None:
    """Raise InputError for pipes, sockets and devices: opening them may wait for ever."""
    if not name:
        raise InputError("an image was given by an empty name", hint="give a file")
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"image {name:.300} is a device or a pipe, not a file", hint="give a file")


def _refuse_large_icons(source: str | PathLike[str] | bytes | bytearray, name: str) -> None:
    """Raise InputError if a picture in an icon is large: Pillow decodes it when it opens the file.

    The directory of an icon says 256 pixels at most, whatever the pictures in it are.
    """
    with (
        BytesIO(source) if isinstance(source, (bytes, bytearray)) else Path(source).open("rb") as f
    ):
        kind, count = struct.unpack("<4sH", f.read(6).ljust(6, b"\0"))
        if kind != b"\0\0\1\0":
            return
        entries = [f.read(16).ljust(16, b"\0") for _ in range(count)]
        offsets = [struct.unpack("<12xI", entry)[0] for entry in entries]
        for offset in offsets:
            f.seek(offset)
            head = f.read(24).ljust(24, b"\0")
            png = head.startswith(b"\x89PNG")
            sides = struct.unpack(">16x2I" if png else "<4x2i12x", head)
            _refuse_large((abs(sides[0]), abs(sides[1]) // (1 if png else 2)), name)


def _if_address(name: str) -> str:
    address = name.startswith("data:") or "://" in name
    return "addresses are not read: download the image, and give its file" if address else ""


def _formats() -> list[str]:
    """FORMATS, and AVIF in those releases of Pillow that know it."""
    from PIL import features

    return [*FORMATS, *(["AVIF"] if "avif" in features.modules else [])]


def _given(image: Image | Array, name: str, upright: bool) -> LoadedImage:
    """A decoded image; the caller's own object stays as it is."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        shaped = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        if image.dtype != np.uint8 or not shaped:
            raise InputError(
                f"an image was given as an array {list(image.shape)} of {image.dtype}, expected "
                "uint8 [height, width] or [height, width, 3 or 4]"
            )
        _refuse_odd_sizes((image.shape[1], image.shape[0]), name)
        return _to_rgb(Image.fromarray(np.ascontiguousarray(image)), name, upright)
    undecoded = bool(getattr(image, "tile", ()))
    if undecoded and image.format not in (*_formats(), "MPO"):
        raise InputError(
            f"image {name} is of the format {image.format}, which is not read", hint=_BY_HAND
        )
    _refuse_odd_sizes(image.size, name)
    # exif_transpose copies too
    return _to_rgb(image if upright else image.copy(), name, upright, depth.declared(image))


def _unreadable(source: object, name: str, refused: Exception) -> InputError:
    """The error for what Pillow did not identify."""
    if isinstance(source, (bytes, bytearray)):
        size, start = len(source), bytes(source[:64])
    elif isinstance(source, (str, PathLike)):
        size = Path(source).stat().st_size
        with Path(source).open("rb") as file:
            start = file.read(64 if size else 0)
    else:
        return InputError(f"image {name} cannot be decoded: {refused}")
    if size == 0:
        return InputError(f"image {name} is empty (0 bytes)")
    if "DecompressionBomb" in type(refused).__name__:
        return InputError(f"image {name} is too large: {str(refused).split(',')[0]}")
    if start.startswith((b"II*\0", b"MM\0*")):
        kind = "a TIFF whose kind of samples Pillow does not read, or a damaged one"
        return InputError(f"image {name} ({size} bytes) is {kind}", hint=_BY_HAND)
    described = f"image {name} ({size} bytes) is not an image"
    for magic, kind in _REFUSED_FORMATS:
        if start.lstrip().startswith(magic):
            return InputError(f"{described} of a format that is read: it is {kind}", hint=_BY_HAND)
    if start[4:8] == b"ftyp":
        kind = start[8:12].decode("latin-1")
        return InputError(
            f"{described} that Pillow can read: it is of the kind {kind!r}", hint=_BY_HAND
        )
    return InputError(f"{described} of a format that is read", hint=f"read: {', '.join(FORMATS)}")


def _refuse_odd_sizes(size: tuple[int, int], name: str) -> None:
    width, height = size
    _refuse_large(size, name)
    if min(size) < 2:
        raise InputError(
            f"image {name} is {width} x {height} pixels; both sides must have at least 2"
        )
    if max(size) > MAX_RATIO * min(size):
        raise InputError(
            f"image {name} is {width} x {height} pixels, an aspect beyond {MAX_RATIO}:1",
            hint="cut it into pieces and give them as several images",
        )


def _refuse_large(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        raise InputError(
            f"image {name} is {width} x {height} pixels; the limit is {MAX_PIXELS // 10**6} "
            f"megapixels and {MAX_SIDE} a side",
            hint="scale it down first; encoders take a few hundred pixels a side",
        )


def _to_rgb(
    file: Image, name: str, upright: bool, stated: depth.Depth | None = None
) -> LoadedImage:
    """stated: the depth that was read before `file` was copied."""
    from PIL import ImageOps

    stated = stated or depth.declared(file)
    notes = _frames(file)
    if file.getexif().get(_ORIENTATION) in range(2, 9):  # read first: loading a TIFF drops it
        notes.append(f"EXIF orientation {'applied' if upright else 'ignored'}")
    shown = ImageOps.exif_transpose(file) if upright else file
    try:
        rgb, note = _deep(shown, stated) if shown.mode in depth.MODES else _bytes(shown, stated)
    except InputError as odd:
        raise InputError(f"image {name} cannot be used: {odd.message}", hint=odd.hint) from None
    return LoadedImage(rgb, (*notes, *note))


def _frames(file: Image) -> list[str]:
    if not getattr(file, "is_animated", False):
        return []
    if file.format == "MPO":
        return [f"several pictures in one JPEG: first of {getattr(file, 'n_frames', 1)} used"]
    if file.format in _COUNTED:
        return [f"animation: first of {getattr(file, 'n_frames', 1)} frames used"]
    return ["animation or several pages: the first is used"]


def _deep(shown: Image, stated: depth.Depth) -> tuple[Image, list[str]]:
    from PIL import Image

    grey, note = depth.to_bytes(shown, stated)
    return Image.fromarray(grey).convert("RGB"), [note]


def _bytes(shown: Image, stated: depth.Depth) -> tuple[Image, list[str]]:
    """An image of bytes. Raises InputError for colours whose meaning is not known."""
    if shown.mode not in (*_CONVERTED, *_DIRECT):
        raise InputError(
            f"its colours are {shown.mode}, which is not read",
            hint="convert it to RGB with a program that knows its colour profile",
        )
    notes = [f"{_CONVERTED[shown.mode]} converted to RGB"] if shown.mode in _CONVERTED else []
    if shown.has_transparency_data or shown.mode == "La":
        notes.append("alpha dropped")
        shown.info.pop("transparency", None)
    if shown.mode in ("La", "RGBa"):  # colours multiplied by alpha
        shown = shown.convert({"La": "LA", "RGBa": "RGBA"}[shown.mode])
    depth.check_colours(shown, stated)
    if stated.sixteen:
        notes.append("16-bit colours scaled to 8 bits")
    return shown.convert("RGB"), notes
