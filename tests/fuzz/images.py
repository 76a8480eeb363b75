"""Pictures: files of every format that is read, changed; and files that once did harm."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from random import Random
from typing import Any

import numpy as np

from edgevlm.toolkit.errors import ToolkitError
from edgevlm.toolkit.images import decode, preprocess
from edgevlm.toolkit.images.preprocess import Preprocess
from tests.fuzz.frame import Place, Violation, refused
from tests.fuzz.mutations import changed_bytes
from tests.refusals import IMAGE

# What an encoder of LLaVA does to a picture, padding included.
_RULE = Preprocess(
    "bicubic", 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (127, 127, 127), exact=(56, 56)
)


@dataclass(frozen=True)
class Picture:
    """The bytes of a file. by_name: whether a file's name is given; once: too slow to change."""

    data: bytes
    by_name: bool = False
    once: bool = False


class Images:
    """Pictures as `run --image` takes them."""

    name = "images"
    share = 8

    def __init__(self, place: Place) -> None:
        self._file = place.work / "photo.jpg"  # whatever it is
        self._seeds: dict[str, Picture] = {}

    def seeds(self) -> Mapping[str, Picture]:
        """Small pictures, and past findings."""
        if not self._seeds:
            quick, slow = {**_written(), **_harmful()}, _large()
            self._seeds = {name: Picture(data) for name, data in quick.items()}
            self._seeds |= {name: Picture(data, once=True) for name, data in slow.items()}
        return self._seeds

    def mutate(self, rng: Random, seed: Picture) -> Picture:
        """Bytes changed, pieces of another seed among them, and PNG's checksums made right."""
        quick = [name for name, picture in self._seeds.items() if not picture.once]
        if seed.once:
            seed = self._seeds[rng.choice(quick)]
        data = changed_bytes(rng, seed.data, self._seeds[rng.choice(quick)].data)
        if data.startswith(_PNG) and rng.random() < 0.7:
            data = _with_checksums(data)
        return Picture(data, rng.random() < 0.2)

    def check(self, case: Picture) -> str:
        """A picture is refused, or RGB within the limits, and can be preprocessed."""
        source: Any = case.data
        if case.by_name:
            self._file.write_bytes(case.data)
            source = self._file
        try:
            image = decode.load(source).rgb
        except ToolkitError as error:
            return refused(error)
        if image.mode != "RGB" or max(image.size) > decode.MAX_SIDE or min(image.size) < 2:
            raise Violation(f"{image.mode} of {image.size}")
        pixels = preprocess.preprocess(image, _RULE)
        if pixels.shape != (3, 56, 56) or not np.isfinite(pixels).all():
            raise Violation(f"pixels {pixels.shape}")
        return "read"


# -- pictures that are right ---------------------------------------------------------------------


def _stored(image: Any, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    if "append_images" in options:  # images keep the settings of the format they were saved in
        options = options | {"append_images": [frame.copy() for frame in options["append_images"]]}
    image.copy().save(file, kind, **options)
    return file.getvalue()


def _written() -> dict[str, bytes]:
    """A picture in each format and kind of pixels that are read."""
    from PIL import Image, features

    generator = np.random.default_rng(3)
    rgb = Image.fromarray(generator.integers(0, 256, (18, 24, 3)).astype(np.uint8))
    deep = Image.fromarray(generator.integers(0, 65536, (18, 24)).astype(np.uint16))
    real = Image.fromarray(generator.random((18, 24)).astype(np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned: dict[str, Any] = {"exif": exif.tobytes()}
    frames: dict[str, Any] = {"save_all": True, "append_images": [rgb.rotate(90), rgb.copy()]}
    found = {
        "jpeg": _stored(rgb, "JPEG", **turned),
        "progressive jpeg": _stored(rgb, "JPEG", progressive=True),
        "grey jpeg": _stored(rgb.convert("L"), "JPEG"),
        "cmyk jpeg": _stored(rgb.convert("CMYK"), "JPEG"),
        "mpo": _stored(rgb, "MPO", **frames),
        "png": _stored(rgb, "PNG", **turned),
        "real png": IMAGE.read_bytes(),
        "deep png": _stored(deep, "PNG"),
        "palette png": _stored(rgb.quantize(16), "PNG", transparency=3),
        "alpha png": _stored(rgb.convert("RGBA"), "PNG"),
        "black and white png": _stored(rgb.convert("1"), "PNG"),
        "animated png": _stored(rgb, "PNG", **frames),
        "gif": _stored(rgb.quantize(16), "GIF"),
        "animated gif": _stored(rgb, "GIF", **frames),
        "webp": _stored(rgb, "WEBP", **turned),
        "lossless webp": _stored(rgb.convert("RGBA"), "WEBP", lossless=True),
        "animated webp": _stored(rgb, "WEBP", **frames),
        "bmp": _stored(rgb, "BMP"),
        "palette bmp": _stored(rgb.quantize(16), "BMP"),
        "ppm": _stored(rgb, "PPM"),
        "pgm of text": b"P2 # grey\n3 2 999\n0 10 999 500 3 4\n",
        "pfm": b"Pf\n4 2\n-1.0\n" + np.linspace(0, 1, 8).astype("<f4").tobytes(),
        "tiff": _stored(rgb, "TIFF"),
        "lzw tiff": _stored(rgb, "TIFF", compression="tiff_lzw", **turned),
        "deflate tiff": _stored(rgb.convert("RGBA"), "TIFF", compression="tiff_adobe_deflate"),
        "jpeg tiff": _stored(rgb, "TIFF", compression="jpeg"),
        "fax tiff": _stored(rgb.convert("1"), "TIFF", compression="group4"),
        "deep tiff": _stored(deep, "TIFF"),
        "float tiff": _stored(real, "TIFF"),
        "pages tiff": _stored(rgb, "TIFF", **frames),
    }
    if "avif" in features.modules and features.check("avif"):
        found["avif"] = _stored(rgb, "AVIF")
    return found


# -- pictures that did harm ----------------------------------------------------------------------

_PNG = b"\x89PNG\r\n\x1a\n"


def png(
    width: int, height: int, pixels: bytes, *extra: bytes, depth: int = 8, kind: int = 0
) -> bytes:
    """A PNG with compressed `pixels` of any stated size."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [_chunk(b"IHDR", head), *extra, _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")]
    return _PNG + b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def _with_checksums(data: bytes) -> bytes:
    """The same PNG with the checksum of each chunk as it should be, as far as there are chunks."""
    made, at = bytearray(data), len(_PNG)
    while at + 12 <= len(made):
        (length,) = struct.unpack(">I", made[at : at + 4])
        end = at + 8 + length
        if end + 4 > len(made):
            break
        made[end : end + 4] = struct.pack(">I", zlib.crc32(bytes(made[at + 4 : end])))
        at = end + 4
    return bytes(made)


def _zeros(count: int) -> bytes:
    """So many zeros in zlib's form: one compressed block, repeated, and the checksum of all."""
    block = 1 << 16
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    repeated = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    rest = last.compress(bytes(count % block)) + last.flush()
    check = struct.pack(">I", (count % 65521) << 16 | 1)  # Adler-32 of zeros
    return b"\x78\xda" + repeated * (count // block) + rest + check


def tiff_of_pages(count: int) -> bytes:
    """A grey TIFF of 4 x 4 pixels and `count` pages, each a directory of its own."""
    pixels = bytes(range(16))
    tags = (
        (256, 4),
        (257, 4),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 4),
        (279, 16),
    )
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    size = 2 + len(entries) + 4
    pages = [
        struct.pack("<H", len(tags))
        + entries
        + struct.pack("<I", 24 + size * (n + 1) if n + 1 < count else 0)
        for n in range(count)
    ]
    return b"II*\0" + struct.pack("<I", 24) + pixels + b"".join(pages)


def gif_of(width: int, height: int) -> bytes:
    """A GIF of some bytes that claims any size."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + frame + b"\x3b"


def _harmful() -> dict[str, bytes]:
    """Past findings, and what they were made of: programs, memory, time."""
    return {
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "binary postscript": b"\xc5\xd0\xd3\xc6"
        + struct.pack("<7I", 32, 60, 0, 0, 0, 0, 0xFFFF)
        + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "endless postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
        b"%%BeginBinary: -19\nshowpage\n",
        "pdf": b"%PDF-1.7\n%%EOF\n",
        "fits": b"SIMPLE  =                    T" + bytes(2850),
        "photoshop": b"8BPS\0\1" + bytes(20),
        "wmf": b"\xd7\xcd\xc6\x9a\0\0" + bytes(80),
        "icns": b"icns" + struct.pack(">I4sI", 40, b"ic07", 32) + bytes(24),
        "icon": struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, 99, 22) + bytes(99),
        "header alone": png(30000, 30000, zlib.compress(bytes(64))),
        "gif of nothing": gif_of(60000, 60000),
        "gif of 81 megapixels": gif_of(9000, 9000),
        "text": png(50, 50, _zeros(51 * 50), _chunk(b"zTXt", b"note\0\0" + _zeros(64 << 20))),
        "profile": png(50, 50, _zeros(51 * 50), _chunk(b"iCCP", b"p\0\0" + _zeros(64 << 20))),
        "pages": tiff_of_pages(20),
        "pages in a ring": tiff_of_pages(2)[:-4] + struct.pack("<I", 24),
        "empty": b"",
    }


def _large() -> dict[str, bytes]:
    """Small files that stand for much memory or time."""
    return {
        "grey of 200 megapixels": png(14142, 14142, _zeros(14143 * 14142)),
        "grey of 99 megapixels": png(9999, 9900, _zeros(10000 * 9900)),
        "deep grey of 90 megapixels": png(9999, 9000, _zeros(19999 * 9000), depth=16),
        "colours of 90 megapixels": png(9999, 9000, _zeros(29998 * 9000), kind=2),
        "thin strip": png(16000, 80, _zeros(16001 * 80)),
        "upright strip": png(80, 16000, _zeros(81 * 16000)),
        "100000 pages": tiff_of_pages(100_000),
    }
