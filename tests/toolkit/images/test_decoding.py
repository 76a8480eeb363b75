"""Image files: what is done to unusual ones and noted, and what is refused."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.images.decode import FORMATS, load
from edgevlm.toolkit.ops.vocabulary import Array

PIXELS = np.random.default_rng(5).integers(0, 256, (6, 9, 3)).astype(np.uint8)
# EXIF orientation -> what makes the stored pixels upright, from the standard's table.
UPRIGHT: dict[int, Any] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


def stored(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(source: bytes) -> Array:
    image = load(source).rgb
    assert image.mode == "RGB"
    return np.asarray(image)


def grey_thrice(values: Array) -> Array:
    return np.repeat(values[..., None], 3, 2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_rotated_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    source = stored(Image.fromarray(PIXELS), kind, exif=exif.tobytes(), **options)
    rotated = orientation in range(2, 9)
    np.testing.assert_array_equal(rgb(source), UPRIGHT.get(orientation, UPRIGHT[1])(PIXELS))
    assert load(source).notes == (("EXIF orientation applied",) if rotated else ())


def test_a_damaged_exif_is_no_reason_to_fail() -> None:
    source = stored(Image.fromarray(PIXELS), "PNG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    np.testing.assert_array_equal(rgb(source), PIXELS)


def test_grey_of_sixteen_bits() -> None:
    values = np.random.default_rng(6).integers(0, 65536, (5, 7)).astype(np.uint16)
    expected = grey_thrice((values >> 8).astype(np.uint8))
    for kind in ("PNG", "TIFF"):
        source = stored(Image.fromarray(values), kind)
        np.testing.assert_array_equal(rgb(source), expected)
        assert load(source).notes == ("16-bit grey scaled to 8 bits",)


def test_grey_of_sixteen_bits_is_rotated_too() -> None:
    values = np.random.default_rng(7).integers(0, 65536, (5, 7)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    source = stored(Image.fromarray(values), "PNG", exif=exif.tobytes())
    expected = grey_thrice((values >> 8).astype(np.uint8))
    np.testing.assert_array_equal(rgb(source), UPRIGHT[6](expected))
    assert len(load(source).notes) == 2


def test_grey_and_black_and_white() -> None:
    values = PIXELS[..., 0]
    source = stored(Image.fromarray(values), "PNG")
    np.testing.assert_array_equal(rgb(source), grey_thrice(values))
    assert load(source).notes == ()
    bits = Image.fromarray(values > 127)
    assert bits.mode == "1"
    black = stored(bits, "PNG")
    np.testing.assert_array_equal(rgb(black), grey_thrice(np.where(values > 127, 255, 0)))
    assert load(black).notes == ()


def test_alpha_is_dropped_and_the_colours_stay() -> None:
    alpha = np.random.default_rng(8).integers(0, 256, (6, 9, 1)).astype(np.uint8)
    source = stored(Image.fromarray(np.concatenate([PIXELS, alpha], 2)), "PNG")
    np.testing.assert_array_equal(rgb(source), PIXELS)
    assert load(source).notes == ("alpha dropped",)
    grey = stored(Image.fromarray(np.concatenate([PIXELS[..., :1], alpha], 2), "LA"), "PNG")
    np.testing.assert_array_equal(rgb(grey), grey_thrice(PIXELS[..., 0]))
    assert load(grey).notes == ("alpha dropped",)


def test_palettes_with_and_without_transparency() -> None:
    image = Image.fromarray(PIXELS).quantize(16)
    colours = np.asarray(image.convert("RGB"))
    source = stored(image, "PNG")
    np.testing.assert_array_equal(rgb(source), colours)
    assert load(source).notes == ("palette converted to RGB",)
    glassy = stored(image, "PNG", transparency=3)
    np.testing.assert_array_equal(rgb(glassy), colours)
    assert load(glassy).notes == ("palette converted to RGB", "alpha dropped")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_one_transparent_colour_is_noted(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    source = stored(image, "PNG", transparency=(1, 2, 3) if mode == "RGB" else 7)
    np.testing.assert_array_equal(rgb(source), np.asarray(image.convert("RGB")))
    assert load(source).notes == ("alpha dropped",)


def test_cmyk_is_converted() -> None:
    source = stored(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100)
    assert load(source).notes == ("CMYK converted to RGB",)
    red, green, blue = rgb(source)[4, 4].astype(int)
    assert red < 8
    assert green > 247
    assert blue > 247


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    source = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(rgb(source), np.asarray(frames[0]))
    counted = kind in ("WEBP", "PNG")  # of the others it would take a walk through all frames
    several = "animation or several pages: the first is used"
    assert ("animation: first of 3 frames used" if counted else several) in load(source).notes


def test_frames_that_nobody_shows_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's count of a TIFF's pages takes time with their square, and can spoil the first page
    where later ones are of another mode (python-pillow/Pillow#9851)."""
    pages = [Image.fromarray(PIXELS), Image.fromarray(PIXELS).quantize(16)]
    more = {"save_all": True, "append_images": pages[1:]}

    def never(*_: Any) -> int:
        raise AssertionError("frames were counted")

    sources = [stored(pages[0], "TIFF", compression="tiff_lzw", **more)]
    sources.append(stored(pages[1], "GIF", save_all=True, append_images=[Image.new("P", (9, 6))]))
    expected = [PIXELS, np.asarray(pages[1].convert("RGB"))]
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.n_frames", property(never))
    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.n_frames", property(never))
    for source, pixels in zip(sources, expected, strict=True):
        np.testing.assert_array_equal(rgb(source), pixels)
        assert "animation or several pages: the first is used" in load(source).notes


def test_a_file_is_read_like_its_bytes_and_closed(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    for source in (tmp_path / "a.gif", str(tmp_path / "a.gif")):
        np.testing.assert_array_equal(np.asarray(load(source).rgb), np.asarray(frames[0]))


def test_the_first_picture_of_a_phone_is_upright_like_a_plain_jpeg() -> None:
    """MPO: a JPEG that holds a second picture, such as a preview or a depth map."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image, second = Image.fromarray(PIXELS), Image.fromarray(PIXELS[:4, :4])
    several = stored(image, "MPO", save_all=True, append_images=[second], exif=exif)
    np.testing.assert_array_equal(rgb(several), rgb(stored(image, "JPEG", exif=exif)))
    assert load(several).notes == (
        "several pictures in one JPEG: first of 2 used",
        "EXIF orientation applied",
    )


# -- refusals ------------------------------------------------------------------------------


def header_only(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that claims any size; it has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((30_000, 30_000), "too large|limit"),
        ((10_001, 10_000), "limit is 100 megapixels"),
        ((16_385, 200), "16384 a side"),
        ((1, 1), "at least 2"),
        ((1, 50), "at least 2"),
        ((402, 2), "aspect beyond 200:1"),
        ((2, 402), "aspect beyond 200:1"),
    ],
)
def test_odd_sizes_are_refused_by_the_header(
    size: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    with pytest.raises(InputError, match=reason):
        load(header_only(*size))


def test_the_limits_themselves_are_allowed() -> None:
    for size in ((2, 2), (400, 2), (2, 400)):
        assert load(stored(Image.new("RGB", size), "PNG")).rgb.size == size


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_a_file_that_was_cut_short_is_refused(kind: str) -> None:
    noise = np.random.default_rng(9).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    whole = stored(Image.fromarray(noise), kind)
    for length in (0, 3, 30, len(whole) // 2):
        with pytest.raises(InputError):
            load(whole[:length])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF"])
def test_a_damaged_file_is_decoded_or_refused(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind in ("GIF", "BMP") else {"exif": exif.tobytes()}
    source = stored(Image.fromarray(PIXELS), kind, **options)
    generator = np.random.default_rng(10)
    for _ in range(60):
        damaged = bytearray(source)
        for index in generator.integers(0, len(source), 3):
            damaged[index] = generator.integers(256)
        with contextlib.suppress(InputError):
            assert load(bytes(damaged)).rgb.mode == "RGB"


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name, reason in (
        ("text.png", "not an image"),
        ("empty.png", "empty"),
        ("missing.png", "does not exist"),
        ("", "is a folder"),
        ("text.png/inside.png", "text.png"),
    ):
        with pytest.raises(InputError, match=reason):
            load(tmp_path / name)
    with pytest.raises(InputError, match="empty name"):
        load("")


def test_a_name_that_is_almost_right_gets_the_right_one(tmp_path: Path) -> None:
    for name in ("Photo.JPG", "holiday.png"):
        (tmp_path / name).touch()
    for given, meant in (("photo.jpg", "Photo.JPG"), ("hoilday.png", "holiday.png")):
        with pytest.raises(InputError) as refused:
            load(tmp_path / given)
        assert refused.value.hint == f"there is {tmp_path / meant}"
    for given, told in (("xyz", "no file of a name like that"), ("a/b.png", "there is no folder")):
        with pytest.raises(InputError) as refused:
            load(tmp_path / given)
        assert told in refused.value.hint


ADDRESSES = (
    "https://example.com/a.jpg",
    "data:image/png;base64," + "iVBORw" * 999,
    "file:///a.png",
)


@pytest.mark.parametrize("name", ADDRESSES, ids=lambda name: name[:12])
def test_addresses_are_not_read(name: str) -> None:
    with pytest.raises(InputError, match="does not exist|name too long") as refused:
        load(name)
    assert len(refused.value.message) < 400
    assert "download" in refused.value.hint


def test_a_device_or_a_pipe_is_no_image(tmp_path: Path) -> None:
    """A pipe that nobody writes into would be waited for without an end."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    for path in (os.devnull, "/dev/zero", tmp_path / "pipe.png", tmp_path / "link.png"):
        with pytest.raises(InputError, match="is a device or a pipe"):
            load(path)


POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n(x) print\nshowpage\n"
)
ENDLESS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n1 pop\n"


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file's name; here it is not opened."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "photo.jpg").write_bytes(POSTSCRIPT)
    sources = (tmp_path / "photo.jpg", POSTSCRIPT, ENDLESS + b"%%BeginBinary: -19\nshowpage\n")
    for source in sources:
        with pytest.raises(InputError, match="it is PostScript") as refused:
            load(source)
        assert refused.value.hint
    with (
        Image.open(BytesIO(POSTSCRIPT)) as opened,
        pytest.raises(InputError, match="format EPS, which is not read"),
    ):
        load(opened)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"%PDF-1.7\n", "PDF"),
        (b"8BPS\0\1", "Photoshop"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b"\0\0\0\x18ftypheic", "'heic'"),
        (b"\xd7\xcd\xc6\x9a\0\0", "WMF"),
        (b"SIMPLE  =", "FITS"),
    ],
)
def test_formats_that_are_not_read_are_named(start: bytes, kind: str) -> None:
    with pytest.raises(InputError, match=kind):
        load(start + bytes(99))


@pytest.mark.parametrize(
    "kind",
    ["BMP", "PPM", "TIFF", "WEBP", "AVIF", "JPEG", "GIF", "PNG", "MPO"],
)
def test_every_format_of_pixels_is_read(kind: str) -> None:
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    assert np.abs(rgb(stored(image, kind)).astype(int) - (200, 100, 50)).max() <= 3


def test_only_decoders_of_photographs_are_reached() -> None:
    """Pillow has forty; each is code that a stranger's file runs."""
    assert set(FORMATS) == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"}
    for kind in ("ICO", "TGA", "PCX", "SGI", "QOI", "JPEG2000", "EPS", "DDS", "SPIDER", "ICNS"):
        source = stored(Image.new("F" if kind == "SPIDER" else "RGB", (16, 16)), kind)
        with pytest.raises(InputError, match="not an image"):
            load(source)
        with Image.open(BytesIO(source)) as opened:
            if opened.format == kind and opened.tile:  # some are decoded when they are opened
                with pytest.raises(InputError, match=f"format {kind}, which is not read"):
                    load(opened)


def test_a_damaged_png_is_not_shown() -> None:
    """Pillow compares no checksum of pixels, and zlib's only if it comes with the last of them."""
    head = header_only(20, 20)[:33]
    packed = zlib.compress(bytes(61 * 20), 0)
    pieces = [b"IDAT" + packed[:-4], b"IDAT" + packed[-4:], b"IEND"]
    chunks = [
        struct.pack(">I", len(piece) - 4) + piece + struct.pack(">I", zlib.crc32(piece))
        for piece in pieces
    ]
    assert not rgb(head + b"".join(chunks)).any()
    changed = bytearray(head + b"".join(chunks))
    changed[100] = 255
    with Image.open(BytesIO(changed)) as unseen:
        assert np.asarray(unseen).any()
    with pytest.raises(InputError, match="its checksum differs"):
        load(bytes(changed))


@pytest.mark.parametrize(
    ("mode", "kind", "side", "each"),
    [("L", "PNG", 9000, 5), ("RGBA", "PNG", 7100, 8), ("RGB", "WEBP", 6000, 12),
     ("I;16", "PNG", 7000, 10)],
)  # fmt: skip
def test_pixels_that_take_too_much_memory_are_refused_with_the_figure(
    mode: str, kind: str, side: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("pixels were decoded")

    small = Image.open(BytesIO(stored(Image.new(mode, (8, 8)), kind)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    monkeypatch.setattr(type(small), "size", (side, side), raising=False)
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: small)
    with pytest.raises(InputError, match=f"{side} pixels of {mode} in {kind}") as refused:
        load(b"")
    assert f"takes {side * side * each / 1e9:.2g} GB, the limit is 0.4 GB" in refused.value.message
    assert "scale it down" in refused.value.hint


def test_a_picture_that_is_turned_is_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    source = stored(Image.fromarray(PIXELS), "JPEG", exif=exif)
    monkeypatch.setattr("edgevlm.toolkit.images.decode.MAX_BYTES", 8 * PIXELS[..., 0].size)
    assert load(source).rgb.size == (6, 9)
    monkeypatch.setattr("edgevlm.toolkit.images.decode.MAX_BYTES", 8 * PIXELS[..., 0].size - 1)
    with pytest.raises(InputError, match="turning it upright takes"):
        load(source)
    assert load(source, upright=False).rgb.size == (9, 6)


def test_a_picture_that_became_a_pipe_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a name and its opening, the name may change."""
    (tmp_path / "photo.png").write_bytes(stored(Image.fromarray(PIXELS), "PNG"))
    looked = (tmp_path / "photo.png").stat()
    (tmp_path / "photo.png").unlink()
    os.mkfifo(tmp_path / "photo.png")
    monkeypatch.setattr(Path, "stat", lambda self, **_: looked)
    with pytest.raises(InputError, match="is a device or a pipe"):
        load(tmp_path / "photo.png")


@pytest.mark.parametrize("kind", [b"IDAT", b"tEXt", b"zzZZ"])
def test_a_part_that_is_longer_than_the_file_gets_no_memory(kind: bytes) -> None:
    """Pillow would make room for as many bytes as a part states."""
    whole = stored(Image.fromarray(PIXELS), "PNG")
    behind = len(whole) - 12  # IEND
    data = whole[:behind] + struct.pack(">I4s", 0x7FFFFFFF, kind) + b"x" + whole[behind:]
    with pytest.raises(InputError, match="a part is longer than the file"):
        load(data)
