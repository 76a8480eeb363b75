"""A picture of points with names, as SVG, without a library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 480, 64, 24, 40, 56
LINE = 14  # least distance of two names
COLOURS = ("#0b6", "#06c", "#c50", "#808", "#777", "#a80")


@dataclass(frozen=True)
class Point:
    """A point of a group; all of a group have one colour."""

    group: str
    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Axis:
    """From 0 to a round number above `top`, on `length` pixels."""

    title: str
    top: float
    length: float

    @property
    def step(self) -> float:
        """Between two marks: 1, 2 or 5 times a power of ten, at most eight of them."""
        least = self.top / 8
        power = 10.0 ** math.floor(math.log10(least))
        return next(power * m for m in (1, 2, 5, 10) if power * m >= least)

    @property
    def marks(self) -> list[float]:
        """Where lines are drawn."""
        return [i * self.step for i in range(math.ceil(self.top / self.step) + 1)]

    def pixels(self, value: float) -> float:
        """Distance from 0."""
        return value / self.marks[-1] * self.length


def scatter(title: str, x: str, y: str, points: Sequence[Point]) -> str:
    """The whole file."""
    across = Axis(x, max(p.x for p in points), WIDTH - LEFT - RIGHT)
    up = Axis(y, max(p.y for p in points), HEIGHT - TOP - BOTTOM)
    groups = list(dict.fromkeys(p.group for p in points))
    colours = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(groups)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 20, title, "font-size='14' font-weight='bold'"),
        *_grid(across, up),
        *_points(points, across, up, colours),
        *_legend(colours),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _grid(across: Axis, up: Axis) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for mark in across.marks:
        at = LEFT + across.pixels(mark)
        parts.append(f'<path d="M{at:.1f} {TOP}V{bottom}" stroke="#ddd"/>')
        parts.append(_text(at, bottom + 16, f"{mark:g}", "text-anchor='middle'"))
    for mark in up.marks:
        at = bottom - up.pixels(mark)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{right}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, at + 4, f"{mark:g}", "text-anchor='end'"))
    middle = (LEFT + right) / 2
    parts.append(_text(middle, HEIGHT - 16, across.title, "text-anchor='middle'"))
    height = (TOP + bottom) / 2
    turned = f"text-anchor='middle' transform='rotate(-90 16 {height:.0f})'"
    return [*parts, _text(16, height, up.title, turned)]


def _points(points: Sequence[Point], across: Axis, up: Axis, colours: dict[str, str]) -> list[str]:
    """From the top, each name to the right of its point, or to the left near the edge."""
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []  # left, right, height of names and points
    placed = [(LEFT + across.pixels(p.x), HEIGHT - BOTTOM - up.pixels(p.y), p) for p in points]
    taken += [(at - 5, at + 5, height) for at, height, _ in placed]
    for at, height, point in sorted(placed, key=lambda item: item[1]):
        colour, long = colours[point.group], 6.5 * len(point.name)
        inwards = at + 9 + long > WIDTH - RIGHT
        begin = at - 9 - long if inwards else at + 9
        others = [t for t in taken if t != (at - 5, at + 5, height)]
        line = _free(height, begin, begin + long, others)
        taken.append((begin, begin + long, line))
        parts.append(f'<circle cx="{at:.1f}" cy="{height:.1f}" r="5" fill="{colour}"/>')
        anchor = "text-anchor='end' " if inwards else ""
        where = at - 9 if inwards else at + 9
        parts.append(_text(where, line + 4, point.name, f"{anchor}fill='{colour}'"))
    return parts


def _free(
    height: float, begin: float, end: float, taken: Sequence[tuple[float, float, float]]
) -> float:
    """The nearest line to `height` where a name from `begin` to `end` meets none of `taken`."""
    lines = [height + sign * step for step in range(0, HEIGHT, 2) for sign in (1, -1)]
    near = [other for left, right, other in taken if begin < right and left < end]
    for line in lines:
        inside = TOP <= line <= HEIGHT - BOTTOM - LINE / 2
        if inside and all(abs(line - other) >= LINE for other in near):
            return line
    return height


def _legend(colours: dict[str, str]) -> list[str]:
    parts, at = [], float(WIDTH - RIGHT)
    for group, colour in reversed(colours.items()):
        parts.append(_text(at, 20, group, f"text-anchor='end' fill='{colour}'"))
        at -= 7.5 * len(group) + 12
    return parts


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'.replace("'", '"')
