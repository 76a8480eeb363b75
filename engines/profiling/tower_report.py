"""A tower's profile for people and tools: text, and files in several formats."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from typing import Any

from edgevlm.engines.profiling import drawings, page, tables
from edgevlm.engines.profiling.context import warnings
from edgevlm.engines.profiling.report import Files, write_texts
from edgevlm.engines.profiling.tower import TowerProfile
from edgevlm.toolkit.strict import to_plain
from edgevlm.toolkit.terminal.console import human_bytes, table

COMPARED = (
    *("engine", "precision", "size", "cosine to the first", "relative rms"),
    *("image ms", "ratio", "images/s", "ratio", "peak MB"),
)


def result(profiles: Sequence[TowerProfile], layers: int) -> tuple[Any, list[str]]:
    """Data and lines of `edgevlm profile`; `compared` holds engines beyond the first."""
    data = to_plain(profiles[0])
    text = [line for p in profiles for line in [p.engine, *lines(p, layers), ""]]
    if len(profiles) > 1:
        data["compared"] = [to_plain(p) for p in profiles[1:]]
        text += table(COMPARED, compared(profiles))
    return data, text


def lines(p: TowerProfile, layers: int) -> list[str]:
    """The profile as text: stages with their floor, then totals, then the slowest layers."""
    bounds = {bound.stage: bound for bound in p.roofline.stages}
    rows = []
    for stage, one in p.stages.items():
        bound = bounds.get(stage)
        floor = ("", "")
        if bound:
            floor = f"{bound.floor_ms:.3g}", f"{bound.reached:.0%} ({bound.limited_by})"
        rows.append((stage, one.p50_ms, one.p90_ms, one.p99_ms, *floor))
    text = table(("stage", "p50 ms", "p90 ms", "p99 ms", "floor ms", "reached"), rows)
    text += ["", *totals(p)]
    if layers and p.layers:
        top = [(s.component, s.name, s.op, s.calls, s.ms) for s in p.layers[:layers]]
        text += ["", *table(("component", "layer", "op", "calls", "ms"), top)]
    return text


def totals(p: TowerProfile) -> list[str]:
    """The figures that people quote, a line each."""
    return [
        f"an image by itself     {p.image_ms:.1f} ms, {p.channels} channels",
        f"in batches of {p.batch}        {p.images_per_s:.3g} images/s (the engine alone)",
        f"load / peak memory     {p.load_ms:.0f} ms / {p.peak_rss_mb:.0f} MB",
        f"device                 {p.device.get('card') or p.device['processor']}, "
        f"{p.device['threads']} threads, {p.device['target']}, {p.device['precision']}",
        *(f"warning                {line}" for line in warnings(p.context)),
    ]


def compared(profiles: Sequence[TowerProfile]) -> list[tuple[object, ...]]:
    """A row per engine, in the columns of COMPARED; ratios and drift are to the first."""
    base = profiles[0]
    return [
        (
            p.engine,
            p.device["precision"],
            human_bytes(p.size_bytes),
            "-" if p.drift is None else f"{p.drift.cosine:.6f}",
            "-" if p.drift is None else f"{p.drift.relative_rms:.3g}",
            p.image_ms,
            p.image_ms / base.image_ms,
            p.images_per_s,
            p.images_per_s / base.images_per_s,
            p.peak_rss_mb,
        )
        for p in profiles
    ]


def write_files(profiles: Sequence[TowerProfile], files: Files) -> None:
    """Write the files that have a path. Raises OutputError if one cannot be written."""
    write_texts({
        files.html: lambda: as_html(profiles),
        files.trace: lambda: tables.trace(profiles[0]),
        files.csv: lambda: as_csv(profiles),
        files.markdown: lambda: as_markdown(profiles),
    })  # fmt: skip


def as_csv(profiles: Sequence[TowerProfile]) -> str:
    """A line per engine and metric, for spreadsheets; columns as of other engines."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(tables.CSV_COLUMNS)
    for p in profiles:
        single = (
            ("throughput", "images/s", p.images_per_s),
            ("load", "ms", p.load_ms),
            ("peak_rss", "MB", p.peak_rss_mb),
            ("engine_size", "bytes", p.size_bytes),
        )
        for row in tables.csv_rows(p.metrics, single):
            writer.writerow((p.engine, p.device["precision"], *row))
    return text.getvalue()


def as_markdown(profiles: Sequence[TowerProfile]) -> str:
    """Tables for a comment in a discussion."""
    first = profiles[0]
    rows = [tuple(tables.plain(value) for value in row) for row in compared(profiles)]
    stages = [
        (name, *map(tables.plain, (s.p50_ms, s.p90_ms, s.p99_ms)))
        for name, s in first.stages.items()
    ]
    device = ", ".join(f"{key} {value}" for key, value in first.device.items())
    parts = [
        tables.markdown(COMPARED, rows),
        f"Stages of {tables.escaped(first.engine)}: one image, {first.channels} channels.\n",
        tables.markdown(("stage", "p50 ms", "p90 ms", "p99 ms"), stages),
        f"{tables.escaped(device)}\n",
        *(f"Warning: {line}.\n" for line in warnings(first.context)),
    ]
    return "\n".join(parts)


def as_html(profiles: Sequence[TowerProfile], layers: int = 40) -> str:
    """One page with everything in it: figures, waterfall, times, roofline, memory, layers."""
    body = "".join(_section(p, layers) for p in profiles)
    if len(profiles) > 1:
        together = page.html_table(COMPARED, compared(profiles))
        engines = [p.engine for p in profiles]
        bars = page.bars(engines, {"one image": [p.image_ms for p in profiles]}, "ms")
        bars += page.bars(engines, {"images a second": [p.images_per_s for p in profiles]}, "")
        body = f"<h2>Comparison</h2>{together}{bars}{body}"
    return page.document(body)


def _section(p: TowerProfile, layers: int) -> str:
    device = ", ".join(f"{key} {value}" for key, value in p.device.items())
    encoder = next(stage for stage in p.stages if stage.startswith("encoder."))
    times = p.samples[encoder]
    parts = [
        f"<h2>{html.escape(p.engine)}</h2><p class=muted>{html.escape(device)}</p>",
        page.figures(totals(p)),
        f"<h3>One image, stage by stage</h3>{drawings.waterfall(p)}{page.stages(p)}",
        f"<h3>Milliseconds of {html.escape(encoder)}, run by run</h3>{drawings.timeline(times)}",
        page.metrics(p),
        page.limits(p),
    ]
    if picture := drawings.memory(p):
        parts.append(f"<h3>Memory over time</h3>{picture}")
    if p.layers:
        parts.append(f"<h3>Slowest layers</h3>{page.layers(p, layers)}")
    return "".join([*parts, page.context(p.context)])
