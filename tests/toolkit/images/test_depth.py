"""Images of more than eight bits: a ramp comes out as the 8-bit ramp, or is refused by name."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.images.decode import LoadedImage, load
from edgevlm.toolkit.ops.vocabulary import Array

HEIGHT, WIDTH = 40, 60
RAMP = np.linspace(0, 1, WIDTH)[None] * 0.7 + np.linspace(0, 1, HEIGHT)[:, None] * 0.3
CODES = {3: "H", 4: "I", 8: "h", 9: "i", 11: "f", 12: "d"}
BYTES, SHORT, LONG, SSHORT, SLONG, FLOAT = 1, 3, 4, 8, 9, 11


def scaled(high: float, kind: str, low: float = 0) -> Array:
    return (RAMP * (high - low) + low).astype(kind)


def tiff(
    data: Array,
    bits: int,
    *extra: tuple[int, int, list[float]],
    sample_format: int = 1,
    photometric: int = 1,
    samples: int = 1,
    order: str = "<",
    width: int = WIDTH,
) -> bytes:
    """An uncompressed TIFF of one strip, written tag by tag."""
    raw = data.astype(data.dtype.newbyteorder(order)).tobytes()  # type: ignore[arg-type]
    tags: list[Any] = [
        (256, LONG, [width]), (257, LONG, [HEIGHT]), (258, SHORT, [bits] * samples),
        (259, SHORT, [1]), (262, SHORT, [photometric]), (273, LONG, [0]), (277, SHORT, [samples]),
        (278, LONG, [HEIGHT]), (279, LONG, [len(raw)]), (339, SHORT, [sample_format] * samples),
        *extra,
    ]  # fmt: skip
    after, values, table = 8 + 2 + 12 * len(tags) + 4, b"", b""
    packed = {
        tag: struct.pack(order + CODES[kind] * len(given), *given) for tag, kind, given in tags
    }
    pixels = after + sum(len(b) for b in packed.values() if len(b) > 4)
    packed[273] = struct.pack(order + "I", pixels)
    for tag, kind, given in sorted(tags):
        content = packed[tag]
        if len(content) > 4:
            values += content
            content = struct.pack(order + "I", after + len(values) - len(content))
        table += struct.pack(order + "HHI", tag, kind, len(given)) + content.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    return start + table + struct.pack(order + "I", 0) + values + raw


def png(colour: int, data: Array) -> bytes:
    """A PNG of 16 bits a channel; Pillow itself writes greys only."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in data)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pgm(maximum: int, kind: bytes = b"P5") -> bytes:
    values = scaled(maximum, ">u2" if maximum > 255 else "u1")
    if kind == b"P6":
        values = np.repeat(values[..., None], 3, 2)
    return kind + b"\n%d %d\n%d\n" % (WIDTH, HEIGHT, maximum) + values.tobytes()


def pfm(values: Array) -> bytes:
    return b"Pf\n%d %d\n-1.0\n" % (WIDTH, HEIGHT) + values[::-1].astype("<f4").tobytes()


def stored(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def packed_12_bits() -> bytes:
    pairs = scaled(4095, "u2").reshape(-1, 2)
    first, second = pairs[:, 0], pairs[:, 1]
    three = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
    return tiff(three.astype("u1").reshape(HEIGHT, -1), 12)


def limits(low: float, high: float, kind: int = FLOAT) -> tuple[Any, Any]:
    return (340, kind, [low]), (341, kind, [high])


def colours(values: Array, channels: int) -> Array:
    return np.repeat(values[..., None], channels, 2)


U16 = scaled(65535, "u2")
READ: dict[str, tuple[bytes, str]] = {
    "float TIFF": (tiff(RAMP.astype("f4"), 32, sample_format=3), "float grey from 0 to 1"),
    "float TIFF, big-endian": (
        tiff(RAMP.astype("f4"), 32, sample_format=3, order=">"),
        "float grey from 0 to 1",
    ),
    "float TIFF, white is 0": (
        tiff((1 - RAMP).astype("f4"), 32, sample_format=3, photometric=0),
        "float grey",
    ),
    "float TIFF of a declared range": (
        tiff(scaled(3000, "f4", -1000), 32, *limits(-1000, 3000), sample_format=3),
        "declared range -1000 to 3000",
    ),
    "PFM": (pfm(RAMP), "float grey from 0 to 1"),
    "16-bit TIFF": (tiff(U16, 16), "16-bit grey scaled"),
    "16-bit TIFF, big-endian": (tiff(U16, 16, order=">"), "16-bit grey scaled"),
    "16-bit TIFF, white is 0": (tiff(65535 - U16, 16, photometric=0), "16-bit grey scaled"),
    "16-bit TIFF, compressed": (
        stored(Image.fromarray(U16), "TIFF", compression="tiff_lzw"),
        "16-bit grey scaled",
    ),
    "12 bits in 16, declared": (
        tiff(scaled(4095, "u2"), 16, (280, SHORT, [0]), (281, SHORT, [4095])),
        "12-bit grey scaled",
    ),
    "12 bits packed": (packed_12_bits(), "12-bit grey scaled"),
    "signed 16 bits, declared": (
        tiff(scaled(3000, "i2", -1000), 16, *limits(-1000, 3000, SSHORT), sample_format=2),
        "declared range -1000 to 3000",
    ),
    "signed 32 bits, declared": (
        tiff(scaled(65535, "i4"), 32, *limits(0, 65535, SLONG), sample_format=2),
        "declared range 0 to 65535",
    ),
    "unsigned 32 bits, declared": (
        tiff(scaled(2**32 - 1, "u4"), 32, *limits(0, 2**32 - 1, LONG)),
        "declared range 0 to 4.29497e+09",
    ),
    "PGM of 16 bits": (pgm(65535), "16-bit grey scaled"),
    "PGM of 10 bits": (pgm(1023), "16-bit grey scaled"),
    "PGM of 7 bits": (pgm(127), ""),
    "PPM of 10 bits": (pgm(1023, b"P6"), ""),
    "PNG of 16 bits": (png(0, U16), "16-bit grey scaled"),
    "PNG of 16 bits, RGB": (png(2, colours(U16, 3)), "16-bit colours scaled"),
    "PNG of 16 bits, RGBA": (png(6, colours(U16, 4)), "16-bit colours scaled"),
    "PNG of 16 bits, LA": (png(4, colours(U16, 2)), "16-bit colours scaled"),
    "TIFF of 16 bits, RGB": (
        tiff(colours(U16, 3), 16, photometric=2, samples=3),
        "16-bit colours scaled",
    ),
    "YCbCr TIFF": (
        stored(
            Image.fromarray(colours(scaled(255, "u1"), 3)).convert("YCbCr"), "TIFF"
        ),
        "YCbCr converted",
    ),
}  # fmt: skip
TOLERANCE = {"PGM of 7 bits": 2.5, "YCbCr TIFF": 2}  # 128 steps; Pillow's conversion and back


def grey(loaded: LoadedImage) -> Array:
    pixels = np.asarray(loaded.rgb).astype(int)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert np.ptp(pixels, axis=2).max() <= 2
    return pixels[..., 0]


@pytest.mark.parametrize("case", READ)
def test_a_deep_ramp_comes_out_as_the_ramp(case: str) -> None:
    source, note = READ[case]
    loaded = load(source)
    assert np.abs(grey(loaded) - 255 * RAMP).max() <= TOLERANCE.get(case, 1)
    assert any(note in line for line in loaded.notes) or (not note and not loaded.notes)


REFUSED: dict[str, tuple[bytes, str]] = {
    "floats to 255": (tiff(scaled(255, "f4"), 32, sample_format=3), "floats from 0 to 255"),
    "floats to 65535": (tiff(scaled(65535, "f4"), 32, sample_format=3), "floats from 0 to 65535"),
    "negative floats": (tiff(scaled(1, "f4", -1), 32, sample_format=3), "floats from -1 to 1"),
    "PFM to 255": (pfm(255 * RAMP), "floats from 0 to 255"),
    "a float that is none": (
        tiff(np.where(RAMP > 0.5, np.nan, RAMP).astype("f4"), 32, sample_format=3),
        "not finite",
    ),
    "32 bits, small": (tiff(scaled(255, "i4"), 32, sample_format=2), "from 0 to 255"),
    "32 bits, full": (
        tiff(scaled(2**31 - 1, "i4", -(2**31)), 32, sample_format=2),
        "signed integers of 32 bits from -2147483648 to 2147483647",
    ),
    "unsigned 32 bits": (tiff(scaled(2**32 - 1, "u4"), 32), "integers of 32 bits from 0 to 4294"),
    "signed 16 bits": (
        tiff(scaled(3000, "i2", -1000), 16, sample_format=2),
        "signed integers of 16 bits from -1000 to 3000",
    ),
    "signed 8 bits": (tiff(scaled(127, "i1", -128), 8, sample_format=2), "signed integers of 8"),
    "12 bits in a 16-bit PNG": (png(0, scaled(4095, "u2")), "none exceeds 4095 of 65535"),
    "12 bits in a 16-bit TIFF": (tiff(scaled(4095, "u2"), 16), "none exceeds 4095 of 65535"),
    "10 bits in 16-bit colours": (png(2, colours(scaled(1023, "u2"), 3)), "no value reaches 4096"),
    "LAB": (
        stored(Image.fromarray(colours(scaled(255, "u1"), 3)).convert("LAB"), "TIFF"),
        "colours are LAB",
    ),
    "64-bit floats": (tiff(RAMP.astype("f8"), 64, sample_format=3), "kind of samples Pillow"),
    "colour floats": (
        tiff(colours(RAMP.astype("f4"), 3), 32, sample_format=3, photometric=2, samples=3),
        "kind of samples Pillow",
    ),
    "colour PFM": (
        b"PF\n%d %d\n-1.0\n" % (WIDTH, HEIGHT) + colours(RAMP.astype("<f4"), 3).tobytes(),
        "a colour PFM",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_values_without_a_range_are_refused_by_name(case: str) -> None:
    source, reason = REFUSED[case]
    with pytest.raises(InputError) as refused:
        load(source)
    assert reason in refused.value.message
    assert refused.value.hint


def test_black_is_black_in_every_depth() -> None:
    head = b"P5\n%d %d\n1023\n" % (WIDTH, HEIGHT)
    for source in (png(0, 0 * U16), head + bytes(2 * RAMP.size), pfm(0 * RAMP)):
        assert not grey(load(source)).any()


def test_dark_images_are_noted() -> None:
    loaded = load(png(0, scaled(9000, "u2")))
    assert grey(loaded).max() == 9000 >> 8
    assert loaded.notes == ("16-bit grey scaled to 8 bits; dark: no value exceeds 9000",)


def test_images_in_memory_keep_their_range() -> None:
    ramp = 255 * RAMP
    assert np.abs(grey(load(Image.fromarray(U16))) - ramp).max() <= 1
    assert np.abs(grey(load(Image.fromarray(RAMP.astype("f4")))) - ramp).max() <= 1
    for source in (pgm(1023), tiff(scaled(4095, "u2"), 16, (281, SHORT, [4095])), pfm(RAMP)):
        for upright in (True, False):
            with Image.open(BytesIO(source)) as opened:
                assert np.abs(grey(load(opened, upright=upright)) - ramp).max() <= 1
    with pytest.raises(InputError, match="integers from 0 to 65535, and nothing says"):
        load(Image.fromarray(scaled(65535, "i4")))


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_colours_multiplied_by_alpha_are_divided_again(mode: str) -> None:
    plain = Image.new("RGBA", (4, 4), (100, 50, 20, 128))
    plain = plain.convert("LA") if mode == "La" else plain
    expected = np.asarray(plain.convert("RGB")).astype(int)
    loaded = load(plain.convert(mode))
    assert loaded.notes == ("alpha dropped",)
    assert np.abs(np.asarray(loaded.rgb).astype(int) - expected).max() <= 1
