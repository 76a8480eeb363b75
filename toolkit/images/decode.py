"""From image files to RGB: which formats are read, what is done to unusual files, what is refused.

`LoadedImage.notes` states what was done.
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np

from edgevlm.toolkit.errors import InputError, silenced
from edgevlm.toolkit.images import absent, depth
from edgevlm.toolkit.ops.vocabulary import Array

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
MAX_SIDE = 16_384
MAX_RATIO = 200  # beyond this, resizing the short edge makes an image of hundreds of megapixels
MAX_BYTES = 400_000_000  # of pixels in memory while an image is decoded and made RGB
# Formats of pixels that people have photographs in; each decoder is code that strangers' files
# reach. Pillow knows forty: for PostScript it starts a program (Ghostscript), and of others it
# reads a part or needs a handler. MPO, of phones, is opened as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_ORIENTATION = 0x0112  # the EXIF tag
_RGB_BYTES = 4  # of a pixel in Pillow, whatever has three or four channels
_PIECE = 1 << 20
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
# EXIF orientation -> what makes the stored pixels upright; the names are Pillow's.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
    7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
_CONVERTED = {"CMYK": "CMYK", "P": "palette", "PA": "palette", "YCbCr": "YCbCr", "HSV": "HSV"}
_DIRECT = ("1", "L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX")
_KEPT = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # as they are, with own_mode
_BY_HAND = "convert it with another program: to PNG, or JPEG"

ImageSource: TypeAlias = "str | PathLike[str] | bytes | bytearray | Image | Array"


@dataclass(frozen=True)
class LoadedImage:
    """A decoded RGB image; `notes` states what was done to get it.

    Loaded with own_mode it may have another mode that converts to RGB.
    """

    rgb: Image
    notes: tuple[str, ...] = ()


def load(source: ImageSource, *, upright: bool = True, own_mode: bool = False) -> LoadedImage:
    """Decode a file, its bytes, a PIL image or a uint8 array to RGB. Raises InputError.

    own_mode: leave palettes and transparency as they are, for preprocessing that converts last.

    Orientation from EXIF is applied if `upright`, transparency dropped, CMYK and palettes are
    converted, deep and float greys scaled to 8 bits by their range; an animation gives its first
    frame. Arrays are [height, width] or [height, width, 3 or 4], RGB.
    """
    from PIL import Image, UnidentifiedImageError

    name = f"{str(source):.300}" if isinstance(source, (str, PathLike)) else "given in memory"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns where we refuse
            if isinstance(source, (Image.Image, np.ndarray)):
                return _given(source, name, upright, own_mode)
            with _file(source, name) as file, silenced():
                return _decoded(file, name, upright, own_mode)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"image {name} does not exist", hint=absent.instead(name)) from None
    except IsADirectoryError:
        raise InputError(f"image {name} is a folder", hint="give one of its files") from None
    except (UnidentifiedImageError, Image.DecompressionBombError) as refused:
        raise _unreadable(source, name, refused) from None
    except MemoryError:
        raise
    except Exception as broken:  # a damaged file makes Pillow's decoders raise anything
        stated = getattr(broken, "strerror", None) or str(broken)  # strerror: without the name
        reason = stated or type(broken).__name__
        raise InputError(
            f"image {name} cannot be decoded: {reason}", hint=absent.of_address(name)
        ) from None


def size_of(file: bytes) -> tuple[int, int]:
    """Width and height as a file states them: nothing is decoded. Raises InputError."""
    from PIL import Image

    name = "given in memory"
    try:
        with warnings.catch_warnings(), silenced():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(file), formats=_formats()) as opened:
                width, height = opened.size
                return int(width), int(height)
    except InputError:
        raise
    except Exception as refused:  # as in `load`
        raise _unreadable(file, name, refused) from None


def _file(source: str | PathLike[str] | bytes | bytearray, name: str) -> BinaryIO:
    """A file of bytes. Raises InputError for pipes, sockets and devices: opening or reading one may
    wait for ever, or never end.
    """
    if isinstance(source, (bytes, bytearray)):
        return BytesIO(source)
    path = Path(source)
    if not str(source):
        raise InputError("an image was given by an empty name", hint="give a file")
    _refuse_devices(path.stat().st_mode, name)  # even opening a device may do something
    # What the name stands for may be another thing by now: not to wait, and to look again.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(number, "rb")
    try:
        _refuse_devices(os.fstat(number).st_mode, name)
    except InputError:
        file.close()
        raise
    return file


def _refuse_devices(mode: int, name: str) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError
    if not stat.S_ISREG(mode):
        raise InputError(f"image {name} is a device or a pipe, not a file", hint="give a file")


def _decoded(file: BinaryIO, name: str, upright: bool, own_mode: bool) -> LoadedImage:
    from PIL import Image

    opened = Image.open(file, formats=_formats())
    try:
        _refuse_odd_sizes(opened.size, name)
        _refuse_memory(opened, name)
        if opened.format == "PNG":
            _check_png(file, name)
        loaded = _to_rgb(opened, _stated(opened), name, upright, own_mode)
    finally:
        opened.close()
    _refuse_odd_sizes(loaded.rgb.size, name)  # decoders may find another size inside
    return loaded


def _refuse_memory(image: Image, name: str) -> None:
    """Raise InputError if an image would take too much memory until it is RGB."""
    width, height = image.size
    planned = width * height * planned_bytes(image)
    if planned > MAX_BYTES:
        kind = f"{image.mode} in {image.format}" if image.format else image.mode
        raise _too_much(name, image.size, f" of {kind}: decoding it", planned)


def _too_much(name: str, size: tuple[int, int], what: str, planned: int) -> InputError:
    return InputError(
        f"image {name} is {size[0]} x {size[1]} pixels{what} takes {planned / 1e9:.2g} GB, the "
        f"limit is {MAX_BYTES / 1e9:g} GB",
        hint="scale it down first; encoders take a few hundred pixels a side",
    )


def planned_bytes(image: Image) -> int:
    """The most bytes that a pixel takes at once until an image is RGB: in the decoder and in what
    it gives, or in that and in RGB.
    """
    decoded = depth.BYTES.get(image.mode, 1 if image.mode in ("1", "L", "P") else _RGB_BYTES)
    made = 0 if image.mode == "RGB" else _RGB_BYTES
    if image.mode in depth.MODES:
        made += decoded + 2  # the array of its values, and grey of 8 bits twice
    # WebP and AVIF are decoded as a whole and handed over as bytes; libtiff decodes strips, which
    # may be all there is. A progressive JPEG keeps two bytes of each sample until its last scan.
    decoder = {"WEBP": 8, "AVIF": 14, "TIFF": decoded}.get(image.format or "", 0)
    if "progressive" in image.info or "progression" in image.info:
        decoder = 2 * len(image.getbands())
    return decoded + max(decoder, made)


def _check_png(file: BinaryIO, name: str) -> None:
    """Raise InputError if a checksum of the pixels is wrong: Pillow compares those of other chunks
    only, and shows the damage. (PNG specification, 13.2: such an error is fatal.)
    """
    at, size = file.tell(), file.seek(0, os.SEEK_END)
    file.seek(8)  # behind the signature
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            break
        if length <= size and kind not in (b"IDAT", b"PLTE"):
            file.seek(length + 4, os.SEEK_CUR)
            continue
        check, left = zlib.crc32(kind), length
        while left and (piece := file.read(min(left, _PIECE))):
            check, left = zlib.crc32(piece, check), left - len(piece)
        stated = file.read(4)
        differs = not left and len(stated) == 4 and struct.unpack(">I", stated)[0] != check
        if differs or length > size:  # for which Pillow would make room
            reason = "its checksum differs" if differs else "a part is longer than the file"
            raise InputError(
                f"image {name} cannot be decoded: {reason}, the file is damaged",
                hint="fetch the file again",
            )
    file.seek(at)


def _formats() -> list[str]:
    """FORMATS, and AVIF in those releases of Pillow that know it."""
    from PIL import features

    return [*FORMATS, *(["AVIF"] if "avif" in features.modules else [])]


def _given(image: Image | Array, name: str, upright: bool, own_mode: bool) -> LoadedImage:
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
        made = Image.fromarray(np.ascontiguousarray(image))
        return _to_rgb(made, _stated(made), name, upright, own_mode)
    undecoded = bool(getattr(image, "tile", ()))  # it would be decoded here
    if undecoded and image.format not in (*_formats(), "MPO"):
        raise InputError(
            f"image {name} is of the format {image.format}, which is not read", hint=_BY_HAND
        )
    _refuse_odd_sizes(image.size, name)
    _refuse_memory(image, name)
    stated = _stated(image)
    image.load()
    copied = image.copy()
    copied.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)  # a TIFF's is not copied
    return _to_rgb(copied, stated, name, upright, own_mode)


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


@dataclass(frozen=True)
class _Stated:
    """What a file states beside its pixels, read before they are decoded."""

    depth: depth.Depth
    orientation: int | None
    notes: tuple[str, ...]


def _stated(file: Image) -> _Stated:
    depths, notes = depth.declared(file), tuple(_frames(file))
    return _Stated(depths, file.getexif().get(_ORIENTATION), notes)


def _to_rgb(file: Image, stated: _Stated, name: str, upright: bool, own_mode: bool) -> LoadedImage:
    """An image of ours, which is closed."""
    from PIL import Image

    notes = list(stated.notes)
    if stated.orientation in _UPRIGHT:
        notes.append(f"EXIF orientation {'applied' if upright else 'ignored'}")
    try:
        if own_mode and file.mode in _KEPT:
            depth.check_colours(file, stated.depth)
            rgb, note = file.copy(), list[str]()
        else:
            deep = file.mode in depth.MODES
            rgb, note = _deep(file, stated.depth) if deep else _bytes(file, stated.depth)
    except InputError as odd:
        raise InputError(f"image {name} cannot be used: {odd.message}", hint=odd.hint) from None
    turn = _UPRIGHT.get(file.getexif().get(_ORIENTATION, 0))  # Pillow has turned a TIFF by now
    if turn is not None and upright:
        planned = 2 * _RGB_BYTES * rgb.width * rgb.height
        if planned > MAX_BYTES:
            raise _too_much(name, rgb.size, ", and turning it upright", planned)
        file.close()  # its pixels need not be there beside two others
        rgb = rgb.transpose(Image.Transpose[turn])
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
    if shown.mode != "RGB":
        return shown.convert("RGB"), notes
    shown.load()
    return shown._new(shown.im), notes  # the same pixels, without the file behind them
