"""Images: unusable ones are refused in one line, unusual ones are used and noted."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.images import decode
from tests.refusals import IMAGE, edgevlm, refuses


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """A grey PNG of any stated size with hardly any data in it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(bytes(64)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, chunk(b"IEND", b"")])


def encoded(kind: str, size: tuple[int, int] = (60, 40)) -> bytes:
    file = BytesIO()
    with Image.open(IMAGE) as image:
        image.convert("RGB").resize(size).save(file, kind)
    return file.getvalue()


FRAME = b"," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\x02\x02\x4c\x01\x00"
GIF_BOMB = b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0) + FRAME + b"\x3b"
TEXT_BOMB = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(200 << 20), 9))

REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty (0 bytes)"),
    "text": (b"this is no image\n" * 9, "is not an image"),
    "zip": (b"PK\x03\x04" + bytes(60), "is not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is not an image"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(40), "is not an image"),
    "one pixel": (png(1, 1), "is 1 x 1 pixels"),
    "bomb": (png(30000, 30000), "too large: Image size (900000000 pixels)"),
    "gif bomb": (GIF_BOMB, "too large: Image size (3600000000 pixels)"),
    "text bomb": (png(50, 50, TEXT_BOMB), "cannot be decoded"),
    "strip": (png(16000, 40), "aspect beyond 200:1"),
    "long strip": (png(100_000, 600), "100000 x 600"),
    "hair": (png(2, 16000), "2 x 16000"),
    "truncated png": (IMAGE.read_bytes()[:4000], "cannot be decoded"),
    "truncated jpeg": (encoded("JPEG")[:600], "cannot be decoded"),
    "truncated gif": (encoded("GIF")[:500], ""),
    "truncated webp": (encoded("WEBP")[:200], ""),
    "truncated tiff": (encoded("TIFF")[:3000], ""),
    "header of a png": (IMAGE.read_bytes()[:20], ""),
    "damaged png": (IMAGE.read_bytes()[:3000] + bytes(200) + IMAGE.read_bytes()[3200:], ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_no_usable_image_is_refused(case: str, ready: Path, tmp_path: Path) -> None:
    data, reason = REFUSED[case]
    image = tmp_path / "my picture.png"
    image.write_bytes(data)
    for words in (("run", ready / "engine-cpu", "What?"), ("profile", ready / "engine-cpu")):
        error, _ = refuses(tmp_path, *words, "--image", image, "--quiet")
        assert str(image) in error
        assert reason in error


def test_a_missing_image_and_a_folder_are_refused(ready: Path, tmp_path: Path) -> None:
    ask = ("run", ready / "engine-cpu", "What?", "--quiet", "--image")
    (tmp_path / "folder.png").mkdir()
    assert "nothing.png does not exist" in refuses(tmp_path, *ask, tmp_path / "nothing.png")[0]
    assert "folder.png is a folder" in refuses(tmp_path, *ask, tmp_path / "folder.png")[0]
    assert "x" * 300 in refuses(tmp_path, *ask, "x" * 300 + ".png")[0]
    assert "two lines.png" in refuses(tmp_path, *ask, tmp_path / "two\nlines.png")[0]


def test_noise_in_any_format_is_refused_or_read() -> None:
    """Decoders may raise anything; what comes out is an image or an InputError."""
    generator, refused = np.random.default_rng(0), 0
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        good = np.frombuffer(encoded(kind), np.uint8)
        for _ in range(40):
            bad = good.copy()
            indices = generator.integers(0, min(len(bad), 400), 6)
            bad[indices] = generator.integers(0, 256, 6)
            try:
                assert decode.load(bad.tobytes()).rgb.mode == "RGB"
            except InputError as error:
                refused += 1
                assert error.message.startswith("image given in memory ")
    assert refused > 40


# -- unusual, used and noted -------------------------------------------------------------------


def animation(path: Path) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def sixteen_bits(path: Path) -> None:
    ramp = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    Image.fromarray(ramp).save(path, "PNG")


def cmyk(path: Path) -> None:
    Image.new("CMYK", (40, 30), (0, 255, 255, 0)).save(path, "JPEG", quality=100)


def palette(path: Path) -> None:
    Image.new("RGB", (40, 30), "red").quantize(4).save(path, "PNG")


def see_through(path: Path) -> None:
    Image.new("RGBA", (40, 30), (255, 0, 0, 90)).save(path, "PNG")


def rotated(path: Path) -> None:
    image = Image.new("RGB", (40, 30), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, "JPEG", exif=exif, quality=100)


UNUSUAL: dict[str, tuple[Callable[[Path], None], str, tuple[int, int]]] = {
    "animated GIF": (animation, "animation or several pages: the first is used", (40, 30)),
    "16 bits": (sixteen_bits, "16-bit grey scaled to 8 bits", (40, 30)),
    "CMYK": (cmyk, "CMYK converted to RGB", (40, 30)),
    "palette": (palette, "palette converted to RGB", (40, 30)),
    "transparency": (see_through, "alpha dropped", (40, 30)),
    "EXIF": (rotated, "EXIF orientation applied", (30, 40)),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_an_unusual_image_is_used_and_noted(case: str, ready: Path, tmp_path: Path) -> None:
    make, note, size = UNUSUAL[case]
    image = tmp_path / "image"
    make(image)
    loaded = decode.load(image).rgb
    assert loaded.size == size
    if case != "16 bits":  # the first frame, the ink and the palette are all red
        assert np.abs(np.asarray(loaded)[5, 5].astype(int) - (255, 0, 0)).max() <= 2
    else:
        values = np.asarray(loaded)[..., 0]
        assert (values[0, 0], values[-1, -1]) == (0, 255)
        assert 126 <= values.mean() <= 129
    words = ("run", ready / "engine-cpu", "What?", "--image", image, "--max-tokens", 1)
    ran = edgevlm(*words)
    assert ran.code == 0
    assert f"note: image 1: {note}" in ran.err.splitlines()
    answer: dict[str, Any] = json.loads(edgevlm(*words, "--json").out)
    assert answer["notes"][0] == f"image 1: {note}"
