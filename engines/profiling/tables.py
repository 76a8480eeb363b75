"""A profile as rows and lines, which text, pages and other programs' tables share."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgevlm.engines.profiling import forms
from edgevlm.engines.profiling.context import warnings
from edgevlm.engines.profiling.forms import Shown
from edgevlm.engines.profiling.metrics import Distribution
from edgevlm.toolkit.terminal.console import human_bytes

_ENGINE = ("engine", "precision", "size")
_CSV = ("engine", "precision", "metric", "unit")
_TRACE = {"displayTimeUnit": "ms", "made_by": "edgevlm profile"}
# What files that are written are known by later.
TRACE_BEGINS = json.dumps(_TRACE)[:-1]
CSV_BEGINS = ",".join(_CSV)
MARKDOWN_BEGINS = f"| {' | '.join(_ENGINE)} |"
_FIGURES = ("mean", "std", "min", "p50", "p90", "p95", "p99", "max", "count")


def columns(profiles: Sequence[Shown]) -> tuple[str, ...]:
    """What engines are compared by."""
    form = forms.of(profiles[0])
    figures = [name for figure in form.figures for name in (figure.column, "ratio")]
    return (*_ENGINE, *form.drifts, *figures, "peak MB")


def compared(profiles: Sequence[Shown]) -> list[tuple[object, ...]]:
    """A row per engine, in the order of `columns`; ratios and drift are to the first."""
    base, form = profiles[0], forms.of(profiles[0])
    rows = list[tuple[object, ...]]()
    for p in profiles:
        engine = p.engine, p.device["precision"], human_bytes(p.size_bytes)
        drift = ("-", "-") if p.drift is None else form.drift(p.drift)
        values = [(getattr(p, f.field), getattr(base, f.field)) for f in form.figures]
        figures = [x for own, first in values for x in (own, own / first)]
        rows.append((*engine, *drift, *figures, p.peak_rss_mb))
    return rows


def as_csv(profiles: Sequence[Shown]) -> str:
    """A line per engine and metric, for spreadsheets."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*_CSV, *_FIGURES))
    for p in profiles:
        single = [(name, unit, getattr(p, field)) for name, unit, field in forms.of(p).single]
        single += [
            ("load", "ms", p.load_ms),
            ("peak_rss", "MB", p.peak_rss_mb),
            ("engine_size", "bytes", p.size_bytes),
        ]
        for row in _csv_rows(p.metrics, single):
            writer.writerow((p.engine, p.device["precision"], *row))
    return text.getvalue()


def _csv_rows(
    found: Mapping[str, Distribution], single: Iterable[tuple[str, str, float]]
) -> Iterator[tuple[object, ...]]:
    """Metric, unit and figures of each metric, and of single values, (name, unit, value)."""
    for name, metric in found.items():
        yield (name, metric.unit, *(getattr(metric, figure) for figure in _FIGURES))
    for name, unit, value in single:
        yield (name, unit, value, 0, *([value] * 6), 1)


def as_markdown(profiles: Sequence[Shown]) -> str:
    """Tables for a comment in a discussion."""
    first, form = profiles[0], forms.of(profiles[0])
    stages = [
        (name, *map(plain, (s.p50_ms, s.p90_ms, s.p99_ms)), *form.share(name, s.p50_ms, first))
        for name, s in first.stages.items()
    ]
    rows = [tuple(plain(value) for value in row) for row in compared(profiles)]
    parts = [
        markdown(columns(profiles), rows),
        f"Stages of {escaped(first.engine)}: {form.size(first)}.\n",
        markdown(("stage", "p50 ms", "p90 ms", "p99 ms", *form.shares), stages),
        f"{escaped(', '.join(f'{key} {value}' for key, value in first.device.items()))}\n",
        *(f"Warning: {line}.\n" for line in warnings(first.context)),
    ]
    return "\n".join(parts)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *([escaped(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def escaped(text: str) -> str:
    """Text in a cell of a table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def plain(value: object) -> str:
    """A figure of four digits, without an exponent where it is large; other values as text."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:,.0f}"


def trace(p: Shown) -> str:
    """Trace events that Chrome and Perfetto open: the last run's stages, and memory over time."""
    events: list[dict[str, Any]] = [
        {
            "name": s.stage,
            "ph": "X",
            "pid": 1,
            "tid": 1,
            "ts": 1000 * s.start_ms,
            "dur": 1000 * s.ms,
        }
        for s in p.spans
    ]
    events.append({"name": "process_name", "ph": "M", "pid": 1, "args": {"name": p.engine}})
    events += [
        {"name": "memory", "ph": "C", "pid": 2, "ts": 1000 * t, "args": {"resident_mb": mb}}
        for t, mb in p.memory
    ]
    events += [
        {"name": name, "ph": "i", "s": "p", "pid": 2, "tid": 1, "ts": 1000 * t}
        for t, name in p.memory_marks
    ]
    whole = {"name": "whole profile"}
    events.append({"name": "process_name", "ph": "M", "pid": 2, "args": whole})
    return json.dumps({**_TRACE, "traceEvents": events, "otherData": p.device})
