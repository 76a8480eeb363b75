"""Digits as hands write them: ten glyphs of strokes, bent, slanted and thickened at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array

_FINE = 4  # strokes are drawn so many times larger, then averaged
_MARGIN = 0.06  # of the image that stays empty on every side
_WIDTHS = (0.09, 0.17)  # of strokes, in sides of the image
_SIZES = (0.78, 1.0)  # of a digit, in what the margins leave
_NARROW = (0.62, 0.95)  # width over height, of the glyph's own
_SLANT, _TURN = 0.3, 0.14  # at most; the turn in radians
_WAVE = 0.05  # how far strokes are bent, in heights of a glyph
_STEP = 15  # degrees between two points of an arc


def _line(*points: tuple[float, float]) -> Array:
    return np.array(points)


def _arc(at: tuple[float, float], radii: tuple[float, float], start: int, end: int) -> Array:
    """Points of an ellipse; 0 degrees is to the right, 90 below."""
    count = abs(end - start) // _STEP + 1
    angles = np.radians(np.linspace(start, end, count))
    points: Array = np.array(at) + np.array(radii) * np.stack([np.cos(angles), np.sin(angles)], 1)
    return points


# Every digit as variants of strokes, in a square from (0, 0) at the upper left to (1, 1).
_GLYPHS: tuple[tuple[tuple[Array, ...], ...], ...] = (
    ((_arc((0.5, 0.5), (0.36, 0.5), -90, 270),),),
    (
        (_line((0.3, 0.25), (0.55, 0.0), (0.55, 1.0)),),
        (_line((0.5, 0.0), (0.5, 1.0)),),
        (_line((0.3, 0.25), (0.55, 0.0), (0.55, 1.0)), _line((0.3, 1.0), (0.8, 1.0))),
    ),
    (
        (
            np.concatenate(
                [_arc((0.5, 0.29), (0.36, 0.29), -165, 45), _line((0.12, 1.0), (0.9, 1.0))]
            ),
        ),
    ),
    (
        (
            _arc((0.45, 0.26), (0.34, 0.26), -150, 90),
            _arc((0.45, 0.75), (0.4, 0.25), -90, 150),
        ),
    ),
    (
        (_line((0.66, 1.0), (0.66, 0.0), (0.08, 0.68), (0.95, 0.68)),),
        (_line((0.3, 0.0), (0.12, 0.6), (0.92, 0.6)), _line((0.7, 0.3), (0.66, 1.0))),
    ),
    (
        (
            _line((0.85, 0.0), (0.24, 0.0), (0.18, 0.46)),
            _arc((0.46, 0.68), (0.38, 0.31), -135, 145),
        ),
    ),
    (
        (
            np.concatenate(
                [
                    _arc((0.75, 0.66), (0.6, 0.66), -95, -180),
                    _arc((0.5, 0.7), (0.35, 0.3), 180, 540),
                ]
            ),
        ),
    ),
    (
        (_line((0.1, 0.0), (0.9, 0.0), (0.4, 1.0)),),
        (_line((0.1, 0.0), (0.9, 0.0), (0.4, 1.0)), _line((0.35, 0.5), (0.85, 0.5))),
    ),
    (
        (
            _arc((0.5, 0.26), (0.29, 0.26), -90, 270),
            _arc((0.5, 0.76), (0.36, 0.24), -90, 270),
        ),
    ),
    (
        (
            _arc((0.5, 0.3), (0.34, 0.3), 0, 360),
            _arc((0.25, 0.34), (0.59, 0.66), 0, 85),
        ),
        (
            _arc((0.5, 0.28), (0.34, 0.28), 0, 360),
            _line((0.84, 0.28), (0.72, 1.0)),
        ),
    ),
)


def ink(value: int, side: int, rng: np.random.Generator) -> Array:
    """A digit, white on black: uint8 [side, side]. Equal states of `rng` draw equal digits."""
    from PIL import Image, ImageDraw

    fine = side * _FINE
    variants = _GLYPHS[value]
    strokes = _placed(_bent(variants[int(rng.integers(len(variants)))], rng), rng)
    half = rng.uniform(*_WIDTHS) * fine / 2
    image = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(image)
    for stroke in strokes:
        points = [(x, y) for x, y in (stroke * fine).tolist()]
        pen.line(points, fill=255, width=round(2 * half))
        for x, y in points:  # round ends and corners, in a third of the time of Pillow's own
            pen.ellipse((x - half, y - half, x + half, y + half), fill=255)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def _bent(strokes: Sequence[Array], rng: np.random.Generator) -> list[Array]:
    """Around (0, 0): every stroke follows one wave, then all are narrowed, slanted and turned."""
    frequencies, phases = rng.uniform(-4, 4, (2, 2)), rng.uniform(0, 2 * np.pi, 2)
    turn, slant = rng.uniform(-_TURN, _TURN), rng.uniform(-_SLANT, _SLANT)
    shape = np.array([[rng.uniform(*_NARROW), 0.0], [slant, 1.0]])
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    centred = [stroke - 0.5 for stroke in strokes]
    waved = [x + _WAVE * np.sin(x @ frequencies + phases) for x in centred]
    return [x @ shape @ rotation for x in waved]


def _placed(strokes: Sequence[Array], rng: np.random.Generator) -> list[Array]:
    """In the middle of the image, as large as margins and strokes allow, or somewhat smaller."""
    every = np.concatenate(strokes)
    low, high = every.min(0), every.max(0)
    room = 1 - 2 * _MARGIN - _WIDTHS[1]
    scale = rng.uniform(*_SIZES) * room / float((high - low).max())
    return [(stroke - (low + high) / 2) * scale + 0.5 for stroke in strokes]
