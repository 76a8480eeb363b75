"""Pictures of a profile as SVG text: stages, latencies, memory, the roofline."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence

from edgevlm.engines.profiling.forms import Shown

COLOURS = ("#3266ad", "#d9822b", "#4a9c5d", "#b1478f", "#c23b3b", "#6b6bc9", "#8c8c3a", "#3aa3a3")
Place = Callable[[float, float], tuple[float, float]]  # from figures to points of the picture
_WIDTH = 970
_MOST_POINTS = 2000


def colour(number: int) -> str:
    """A colour of its own for each of the first few things, then again."""
    return COLOURS[number % len(COLOURS)]


def waterfall(p: Shown) -> str:
    """A row per stage of the last run; every decode step is a bar of its row."""
    end = max(s.start_ms + s.ms for s in p.spans) or 1.0
    names = list(dict.fromkeys(s.stage for s in p.spans))
    bars = []
    for span in p.spans:
        row = names.index(span.stage)
        x, width = 170 + 760 * span.start_ms / end, max(760 * span.ms / end, 0.5)
        bars.append(
            f"<rect x='{x:.1f}' y='{row * 24 + 4}' width='{width:.1f}' height='17' "
            f"fill='{colour(row)}'><title>{html.escape(span.stage)} "
            f"{span.ms:.2f} ms</title></rect>"
        )
    labels = [_label(0, row * 24 + 17, name) for row, name in enumerate(names)]
    bottom = len(names) * 24 + 4
    ticks = [
        f"<line x1='{170 + 760 * i / 5:.0f}' x2='{170 + 760 * i / 5:.0f}' y1='0' y2='{bottom}' "
        f"class='grid'/>" + _label(170 + 760 * i / 5, bottom + 14, _ms(end * i / 5), "middle")
        for i in range(6)
    ]
    return svg(_WIDTH, bottom + 20, [*ticks, *bars, *labels])


def timeline(values: Sequence[float]) -> str:
    """Milliseconds of each token, in order."""
    top, step = max(values) or 1.0, 900 / max(len(values) - 1, 1)
    thinned = _thinned(list(enumerate(values)))
    points = " ".join(f"{60 + i * step:.1f},{125 - 110 * v / top:.1f}" for i, v in thinned)
    line = f"<polyline points='{points}' fill='none' stroke='{COLOURS[0]}'/>"
    marks = [_label(0, 19, _ms(top)), _label(0, 128, "0 ms")]
    return svg(_WIDTH, 135, [line, *marks])


def histogram(values: Sequence[float], bins: int = 40) -> str:
    """How often each latency came."""
    low, high = min(values), max(values)
    width = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / width), bins - 1)] += 1
    bars = [
        f"<rect x='{i * 24}' y='{115 - 100 * n / max(counts):.1f}' width='22' "
        f"height='{100 * n / max(counts):.1f}' fill='{COLOURS[0]}'>"
        f"<title>{low + i * width:.2f} to {low + (i + 1) * width:.2f} ms: {n}</title></rect>"
        for i, n in enumerate(counts)
    ]
    axis = [_label(0, 130, _ms(low)), _label(960, 130, _ms(high), "end")]
    axis.append(_label(0, 11, f"{max(counts)} tokens"))
    return svg(_WIDTH, 135, bars + axis)


def memory(p: Shown) -> str:
    """Resident memory from before the engine was opened to the end; "" where it is not known."""
    if len(p.memory) < 2:
        return ""
    end, top = p.memory[-1][0] or 1.0, max(mb for _, mb in p.memory) or 1.0
    scale = 890 / end
    thinned = _thinned(p.memory)
    points = " ".join(f"{70 + t * scale:.1f},{130 - 110 * mb / top:.1f}" for t, mb in thinned)
    area = f"<polygon points='70,130 {points} {70 + thinned[-1][0] * scale:.1f},130' class='area'/>"
    marks = [
        f"<line x1='{70 + t * scale:.1f}' x2='{70 + t * scale:.1f}' y1='14' y2='130' class='grid'>"
        f"<title>{html.escape(name)}</title></line>" + _label(72 + t * scale, 11, name)
        for t, name in _spaced(_told(p.memory_marks), 110 / scale)
    ]
    axis = [_label(0, 28, f"{top:.0f} MB"), _label(0, 133, "0 MB")]
    axis.append(_label(960, 146, _ms(end), "end"))
    return svg(_WIDTH, 150, [*marks, area, *axis])


def roofline(profiles: Sequence[Shown]) -> str:
    """Operations per byte against operations per second, both on logarithmic axes: the roofs of
    the machine, and a dot for each stage that was measured.
    """
    dots = [dot for number, p in enumerate(profiles) for dot in _dots(p, number)]
    roof = profiles[0].roofline
    if not dots or min(roof.peak_gflop_s, roof.peak_gb_s) <= 0:
        return ""
    best = max(roof.peak_gflop_s, roof.peak_int8_gop_s)
    low_x, high_x = _decades([d[0] for d in dots] + [best / roof.peak_gb_s])
    low_y, high_y = _decades([d[1] for d in dots] + [best, roof.peak_gflop_s])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - low_x) / (high_x - low_x)
        up = (math.log10(max(y, 10.0**low_y)) - low_y) / (high_y - low_y)
        return 70 + 880 * across, 330 - 310 * up

    parts = [*_grid(low_x, high_x, low_y, high_y, at)]
    roofs = {"float": roof.peak_gflop_s, "8 bits": roof.peak_int8_gop_s}
    for number, (name, peak) in enumerate(roofs.items()):
        begin = (10.0**low_x, roof.peak_gb_s * 10.0**low_x)
        ridge, end = (peak / roof.peak_gb_s, peak), (10.0**high_x, peak)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*begin), at(*ridge), at(*end)))
        dash = " stroke-dasharray='6 4'" if number else ""
        parts.append(f"<polyline points='{line}' fill='none' class='roof'{dash}/>")
        parts.append(_label(*_above(at(*end)), f"{peak:,.0f} G/s in {name}", "end"))
    for x, y, name, number in dots:
        cx, cy = at(x, y)
        title = f"<title>{html.escape(name)}: {x:.3g} operations a byte, {y:.3g} G/s</title>"
        parts.append(f"<circle cx='{cx:.1f}' cy='{cy:.1f}' r='5' fill='{colour(number)}'>{title}")
        parts.append(f"</circle>{_label(cx + 8, cy + 4, name)}")
    parts.append(_label(510, 362, "operations a byte of weights and KV cache", "middle"))
    parts.append(_label(80, 12, "10^9 operations a second"))
    return svg(_WIDTH, 368, parts)


def _dots(p: Shown, number: int) -> Iterable[tuple[float, float, str, int]]:
    for bound in p.roofline.stages:
        measured = p.stages.get(bound.stage)
        if measured and measured.p50_ms > 0 and bound.gbytes > 0 and bound.gflops > 0:
            rate = 1000 * bound.gflops / measured.p50_ms
            yield bound.gflops / bound.gbytes, rate, bound.stage, number


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten below and above all values."""
    low = math.floor(math.log10(min(values)) - 0.05)
    return low, max(math.ceil(math.log10(max(values)) + 0.05), low + 1)


def _grid(low_x: int, high_x: int, low_y: int, high_y: int, place: Place) -> Iterable[str]:
    for power in range(low_x, high_x + 1):
        x, _ = place(10.0**power, 10.0**low_y)
        yield f"<line x1='{x:.1f}' x2='{x:.1f}' y1='20' y2='330' class='grid'/>"
        yield _label(x, 345, f"{10.0**power:g}", "middle")
    for power in range(low_y, high_y + 1):
        _, y = place(10.0**low_x, 10.0**power)
        yield f"<line x1='70' x2='950' y1='{y:.1f}' y2='{y:.1f}' class='grid'/>"
        yield _label(64, y + 4, f"{10.0**power:g}", "end")


def _above(point: tuple[float, float]) -> tuple[float, float]:
    return point[0], point[1] - 5


def _told(marks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The marks that have a label: one for all runs, one for what comes behind them."""
    names = {"run 1": "runs", "limits": "measuring the machine's limits"}
    later = re.compile(r"run (?!1$)\d+")
    return [(at, names.get(name, name)) for at, name in marks if not later.fullmatch(name)]


def _spaced(marks: Sequence[tuple[float, str]], apart: float) -> list[tuple[float, str]]:
    """The marks whose labels do not overlap the next one."""
    kept: list[tuple[float, str]] = []
    for moment, name in reversed(marks):
        if not kept or kept[-1][0] - moment >= apart:
            kept.append((moment, name))
    return kept[::-1]


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most some 2,000 of them: a screen shows no more."""
    return points[:: -(-len(points) // _MOST_POINTS)]


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def _label(x: float, y: float, text: str, anchor: str = "start") -> str:
    where = f" text-anchor='{anchor}'" if anchor != "start" else ""
    return f"<text x='{x:.1f}' y='{y:.1f}'{where}>{html.escape(text)}</text>"


def svg(width: int, height: int, elements: Sequence[str]) -> str:
    """A picture of these elements."""
    return (
        f"<svg viewBox='0 0 {width} {height}' width='{width}' role='img'>{''.join(elements)}</svg>"
    )
