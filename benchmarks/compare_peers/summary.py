"""From the children's lines to medians, bars, a Markdown table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import QUIET_SHARE, Bar, Spread, spread
from benchmarks.compare_peers.side import POSITIONS
from benchmarks.scatter import Point, scatter

FLOAT = "float32"
SAME = 0.9  # least cosine of features for the same work, rounded or not
# Figure: a lap's name, its factor, in the table.
TIMES = {
    "encoder": ("encoder", 1.0),
    "first_token": ("first_token", 1.0),
    "token_ms": ("token", 1000.0),
}
VNNI = {"avx512_vnni", "avx_vnni"}


@dataclass
class Row:
    """A program with one setting, and the lines of its children by number of threads."""

    program: str
    name: str
    model_mb: float
    installed_mb: float
    lines: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Its name in results."""
        return f"{self.program} {self.name}"

    def laps(self, threads: int, name: str, clock: str) -> list[float]:
        """Seconds; of the wall's clock the undisturbed ones, if there are three."""
        laps = [lap for line in self.lines.get(threads, ()) for lap in line["laps"].get(name, ())]
        laps = [lap for lap in laps if clock in lap]
        quiet = [lap for lap in laps if lap["elsewhere"] < QUIET_SHARE]
        chosen = quiet if clock == "wall_s" and len(quiet) >= 3 else laps
        return [lap[clock] for lap in chosen]

    def figures(self, threads: int) -> dict[str, Spread]:
        """Spreads by name: *_cpu on one thread by the process's clock, others by the wall's."""
        found = {}
        for figure, (name, factor) in TIMES.items():
            for ending, lap in (
                ("", self.laps(threads, name, "wall_s")),
                ("_cpu", self.laps(1, name, "cpu_s")),
            ):
                if lap:
                    found[figure + ending] = spread([value * factor for value in lap])
        lines = self.lines.get(threads, [])
        found["load"] = spread([line["load_s"] for line in lines])
        found["peak_rss_mb"] = spread([line["peak_rss_mb"] for line in lines], 0)
        shares = [
            lap["elsewhere"] for line in lines for laps in line["laps"].values() for lap in laps
        ]
        found["elsewhere"] = spread(shares)
        return found

    def told(self) -> dict[str, Any]:
        """What does not vary."""
        line = next(line for lines in self.lines.values() for line in lines)
        return {
            "versions": line["versions"],
            "positions": line["positions"],
            "model_mb": round(self.model_mb),
            "installed_mb": round(self.installed_mb),
        }


def flags() -> list[str]:
    """What the processor can do, of what matters here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = next((line.split(":", 1)[1].split() for line in lines if line[:5] == "flags"), [])
    known = ("avx2", "avx512f", "avx512_bf16", "amx_int8", "amx_bf16", *sorted(VNNI))
    return [flag for flag in known if flag in found]


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """1 if two programs' features agree."""
    lengths = sum(a * a for a in one) * sum(b * b for b in other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / (lengths**0.5 or 1.0)


def likeness(rows: Sequence[Row]) -> dict[str, float]:
    """The cosine of each row's features to those of the first row that computes in float32."""
    features = {
        row.key: line["features"]
        for row in rows
        for lines in row.lines.values()
        for line in lines
        if line["features"]
    }
    exact = next((key for key in features if FLOAT in key or "f32" in key), None)
    if exact is None:
        return {}
    return {key: round(cosine(features[exact], found), 4) for key, found in features.items()}


def doubts(rows: Sequence[Row], alike: dict[str, float]) -> list[str]:
    """Notes on rows that do not do the same work."""
    notes = [f"{key}: features differ, cosine {c:g}" for key, c in alike.items() if c < SAME]
    for row in rows:
        if abs(row.told()["positions"] - POSITIONS) > 4:
            notes.append(f"{row.key}: {row.told()['positions']} positions, not {POSITIONS}")
    return notes


# -- bars ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """A bar: ours over the best of the others. at_least: a rate, which is to be higher."""

    what: str
    figure: str
    ours: str
    others: tuple[str, ...]
    limit: float
    at_least: bool = False


def wanted(ours: str, vnni: bool) -> list[Wanted]:
    """All bars, for one setting of ours and for float32."""
    best, group = f"edgevlm {ours}", ("openvino int8, group 128",)
    four = ("openvino int4, group 128, f32 hint", "llama.cpp Q4_0 + f16")
    small, quick = (
        ("llama.cpp Q8_0 + f16",),
        ("onnxruntime-genai int4, block 32, language model alone",),
    )
    bars = [
        Wanted("encoder and merger", "encoder", best, group, 0.8 if vnni else 0.6),
        Wanted("first token", "first_token", best, group, 0.8 if vnni else 0.55),
        Wanted("decode rate", "token_ms", best, four, 1.1, True),
        Wanted("peak memory", "peak_rss_mb", best, small, 1.0),
        Wanted("load", "load", best, quick, 1.0),
    ]
    for other in ("openvino fp16, f32 hint", "llama.cpp f32 + f32"):
        exact = f"edgevlm {FLOAT}"
        bars.append(Wanted("first token in float32", "first_token", exact, (other,), 1.0))
        bars.append(Wanted("decode rate in float32", "token_ms", exact, (other,), 1.0, True))
    return bars


def ratio(bar: Wanted, medians: dict[str, dict[str, float]], ending: str = "") -> float | None:
    """Ours over the best of the others; of rates, which are 1 / time, if the bar is on one."""
    figure = bar.figure + ending
    found = [medians[name][figure] for name in bar.others if figure in medians.get(name, {})]
    mine = medians.get(bar.ours, {}).get(figure)
    if mine is None or not found:
        return None
    return min(found) / mine if bar.at_least else mine / min(found)


def named(bar: Wanted) -> str:
    """What a bar compares."""
    return f"{bar.what}: {bar.ours} / {' or '.join(bar.others)}"


def bars(all_wanted: Sequence[Wanted], medians: dict[str, dict[str, float]]) -> list[Bar]:
    """Those whose programs were measured."""
    found = []
    for bar in all_wanted:
        value = ratio(bar, medians)
        if value is not None:
            found.append(Bar(named(bar), round(value, 3), bar.limit, bar.at_least))
    return found


# -- for people ----------------------------------------------------------------------------------


COLUMNS = {
    "encoder": "encoder + merger, s",
    "encoder_cpu": "CPU s",
    "first_token": "first token, s",
    "first_token_cpu": "CPU s",
    "token_ms": "ms a token",
    "token_ms_cpu": "CPU ms",
}


def markdown(rows: Sequence[Row], threads: int, alike: dict[str, float]) -> list[str]:
    """The table of all rows."""
    more = ("tokens/s", "load, s", "peak MB", "model MB", "installed MB", "cosine", "others")
    lines = [_line("program", "setting", *COLUMNS.values(), *more)]
    lines.append("|" + "---|" * (2 + len(COLUMNS) + len(more)))
    for row in rows:
        found, fixed = row.figures(threads), row.told()
        cells = [_cell(found.get(figure)) for figure in COLUMNS]
        token = found.get("token_ms")
        last = [
            f"{1000 / token.median:.1f}" if token else "–",
            f"{found['load'].median:.2f}",
            f"{found['peak_rss_mb'].median:,.0f}",
            f"{fixed['model_mb']:,}",
            f"{fixed['installed_mb']:,}",
            f"{alike[row.key]:.3f}" if row.key in alike else "–",
            f"{found['elsewhere'].median:.0%}",
        ]
        lines.append(_line(row.program, row.name, *cells, *last))
    return lines


def versions(rows: Sequence[Row]) -> str:
    """Of all programs and what they stand on."""
    found = {" ".join(item): None for row in rows for item in row.told()["versions"].items()}
    return ", ".join(found)


def ratios(all_wanted: Sequence[Wanted], medians: dict[str, dict[str, float]]) -> list[str]:
    """The table of the bars that were measured, on both clocks."""
    lines = [_line("bar", "limit", "wall", "CPU, one thread"), "|---|---|---|---|"]
    for bar in all_wanted:
        values = [ratio(bar, medians, ending) for ending in ("", "_cpu")]
        if values[0] is None:
            continue
        cells = ["–" if value is None else f"{value:.2f}" for value in values]
        lines.append(_line(named(bar), f"{'>=' if bar.at_least else '<='} {bar.limit:g}", *cells))
    return lines


def picture(rows: Sequence[Row], threads: int) -> str:
    """Time to the first token against decode rate; empty if nobody sees images."""
    points = []
    for row in rows:
        found = row.figures(threads)
        if "encoder" in found and "first_token" in found:
            rate = 1000 / found["token_ms"].median
            points.append(Point(row.program, row.name, found["first_token"].median, rate))
    title = f"Left and up is better: {threads} threads"
    return scatter(title, "time to first token, s", "tokens/s after it", points) if points else ""


def _cell(value: Spread | None) -> str:
    if value is None:
        return "–"
    digits = 2 if value.median < 10 else 1
    low, high = f"{value.min:.{digits}f}", f"{value.max:.{digits}f}"
    return f"{value.median:.{digits}f}" + (f" [{low}-{high}]" if value.runs > 1 else "")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
