"""A profile for people and tools: a table, one self-contained HTML file, a Chrome trace."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgevlm.engines.profiling.profile import Profile
from edgevlm.engines.runtime.clock import Span
from edgevlm.toolkit.errors import InputError, OutputError
from edgevlm.toolkit.strict import to_plain
from edgevlm.toolkit.terminal.console import table

_COLOURS = ("#3266ad", "#d9822b", "#4a9c5d", "#b1478f", "#c23b3b", "#6b6bc9", "#8c8c3a", "#3aa3a3")


def check_files(layers: int, *files: Path | None) -> None:
    """Raise before anything is measured if the report could not be shown or written."""
    if layers < 0:
        raise InputError(f"--layers {layers} is negative", hint="0 shows none")
    for file in files:
        if file is None:
            continue
        if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
            raise OutputError(f"{file} cannot be written", hint="name a file in a folder of yours")


def write_files(profiles: Sequence[Profile], page: Path | None, events: Path | None) -> None:
    """Write the files that have a path. Raises OutputError if one cannot be written."""
    try:
        if page is not None:
            write_html(page, profiles)
        if events is not None:
            events.write_text(trace(profiles[0]), encoding="utf-8")
    except OSError as refused:
        raise OutputError(f"{refused.filename} cannot be written: {refused.strerror}") from None


class Traced(Protocol):
    """A profile of either kind."""

    @property
    def spans(self) -> Sequence[Span]: ...

    @property
    def device(self) -> Mapping[str, str]: ...


def refuse_page(page: Path | None) -> None:
    """Raise InputError for a page of a tower by itself: it would have a single bar."""
    if page is not None:
        raise InputError(
            f"--html {page} is for engines with a language model",
            hint="a tower by itself: --layers N, --trace FILE, --json",
        )


def write_trace(p: Traced, events: Path | None) -> None:
    """Write the trace, if it has a path. Raises OutputError if it cannot be written."""
    if events is not None:
        try:
            events.write_text(trace(p), encoding="utf-8")
        except OSError as refused:
            raise OutputError(f"{events} cannot be written: {refused.strerror}") from None


def result(profiles: Sequence[Profile], layers: int) -> tuple[Any, list[str]]:
    """Data and lines of `edgevlm profile`; `compared` holds engines beyond the first."""
    data = to_plain(profiles[0])
    if len(profiles) > 1:
        data["compared"] = [to_plain(p) for p in profiles[1:]]
    text = [line for p in profiles for line in [p.engine, *lines(p, layers), ""]]
    return data, text + (comparison(profiles) if len(profiles) > 1 else [])


def lines(p: Profile, layers: int) -> list[str]:
    """The profile as text: stages with their floor, then totals, then the slowest layers."""
    reached = {bound.stage: bound for bound in p.roofline.stages}
    rows = []
    for stage, spread in p.stages.items():
        bound = reached.get(stage)
        floor = ("", "")
        if bound:
            floor = (f"{bound.floor_ms:.3g}", f"{bound.reached:.0%} ({bound.limited_by})")
        share = "" if stage == "decode" else f"{spread.p50_ms / p.time_to_first_token_ms:.0%}"
        rows.append((stage, spread.p50_ms, spread.p90_ms, spread.p99_ms, share, *floor))
    text = table(
        ("stage", "p50 ms", "p90 ms", "p99 ms", "of first token", "floor ms", "reached"), rows
    )
    text += ["", *_totals(p)]
    if layers and p.layers:
        top = [(s.component, s.name, s.op, s.calls, s.ms) for s in p.layers[:layers]]
        text += ["", *table(("component", "layer", "op", "calls", "ms"), top)]
    return text


def _totals(p: Profile) -> list[str]:
    decode = next(b for b in p.roofline.stages if b.stage == "decode")
    return [
        f"time to first token    {p.time_to_first_token_ms:.1f} ms "
        f"({p.prompt_tokens} prompt tokens, {p.image_tokens} of them image)",
        f"inter-token latency    {p.inter_token_latency_ms:.2f} ms "
        f"({p.output_token_throughput_per_user:.1f} tokens/s)",
        f"prefill                {p.prefill_tokens_per_s:.0f} tokens/s",
        f"load / peak memory     {p.load_ms:.0f} ms / {p.peak_rss_mb:.0f} MB",
        f"speed of light         {decode.gbytes:.3g} GB of weights and KV cache a token "
        f"at the measured {p.roofline.peak_gb_s:.3g} GB/s: "
        f"{_rate(1000 / max(decode.floor_ms, 1e-9))} tokens/s at best",
        f"device                 {p.device.get('card') or p.device['processor']}, "
        f"{p.device['threads']} threads, "
        f"{p.device['target']}, {p.device['precision']}",
    ]


def _rate(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def comparison(profiles: Sequence[Profile]) -> list[str]:
    """Several engines in one table; ratios are to the first."""
    base = profiles[0]
    rows = [
        (
            p.engine,
            p.time_to_first_token_ms,
            p.time_to_first_token_ms / base.time_to_first_token_ms,
            p.inter_token_latency_ms,
            p.inter_token_latency_ms / base.inter_token_latency_ms,
            p.peak_rss_mb,
        )
        for p in profiles
    ]
    return table(("engine", "first token ms", "ratio", "ms a token", "ratio", "peak MB"), rows)


def trace(p: Traced) -> str:
    """Trace events that Chrome and Perfetto open; the last run's stages and the layers."""
    events = [
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
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(p.device)})


def write_html(path: Path, profiles: Sequence[Profile], layers: int = 25) -> None:
    """One file with everything in it: figures, waterfall, latencies, roofline, layers."""
    body = "".join(_section(p, layers) for p in profiles)
    if len(profiles) > 1:
        body = (
            f"<h2>Comparison</h2><pre>{html.escape(chr(10).join(comparison(profiles)))}</pre>"
            + body
        )
    head = f"<!doctype html><meta charset=utf-8><title>edgevlm</title><style>{_STYLE}</style>"
    path.write_text(f"{head}<h1>edgevlm profile</h1>{body}", encoding="utf-8")


_STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:1000px;margin:2em auto;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;text-align:right;"
    "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
    "svg{display:block;margin:.5em 0 1.5em}pre{background:#f6f6f6;padding:1em;overflow:auto}"
    "h2{margin-top:2em}.muted{color:#777}"
)


def _section(p: Profile, layers: int) -> str:
    device = ", ".join(f"{key} {value}" for key, value in p.device.items())
    stages = _html_table(
        ("stage", "p50 ms", "p90 ms", "p99 ms", "mean ms"),
        [(n, s.p50_ms, s.p90_ms, s.p99_ms, s.mean_ms) for n, s in p.stages.items()],
    )
    roof = _html_table(
        ("stage", "GFLOP", "GB moved", "of it KV cache", "floor ms", "limited by", "reached"),
        [
            (
                b.stage,
                b.gflops,
                b.gbytes,
                b.kv_gbytes,
                b.floor_ms,
                b.limited_by,
                f"{b.reached:.0%}",
            )
            for b in p.roofline.stages
        ],
    )
    top = _html_table(
        ("layer", "op", "calls", "ms"), [(s.name, s.op, s.calls, s.ms) for s in p.layers[:layers]]
    )
    return (
        f"<h2>{html.escape(p.engine)}</h2><p class=muted>{html.escape(device)}</p>"
        f"<pre>{html.escape(chr(10).join(_totals(p)))}</pre>"
        f"<h3>One question, stage by stage</h3>{_waterfall(p)}{stages}"
        f"<h3>Milliseconds per token, in order</h3>{_timeline(p.samples['decode'])}"
        f"<h3>How often each latency</h3>{_histogram(p.samples['decode'])}"
        f"<h3>Against the machine's limits (measured: {p.roofline.peak_gflop_s:.0f} GFLOP/s, "
        f"{p.roofline.peak_int8_gop_s:.0f} GOP/s in 8 bits, "
        f"{p.roofline.peak_gb_s:.1f} GB/s)</h3>{roof}"
        + (f"<h3>Slowest layers</h3>{top}" if p.layers else "")
    )


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_text(v))}</td>" for v in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{cells}</table>"


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _waterfall(p: Profile) -> str:
    """A bar per stage up to the first token; decode as one bar behind it."""
    end = max(s.start_ms + s.ms for s in p.spans) or 1.0
    names = list(dict.fromkeys(s.stage for s in p.spans))
    bars = []
    for span in p.spans:
        row = names.index(span.stage)
        x, width = 160 + 800 * span.start_ms / end, max(800 * span.ms / end, 0.5)
        bars.append(
            f"<rect x='{x:.1f}' y='{row * 22 + 4}' width='{width:.1f}' height='16' "
            f"fill='{_COLOURS[row % len(_COLOURS)]}'><title>{html.escape(span.stage)} "
            f"{span.ms:.2f} ms</title></rect>"
        )
    labels = [
        f"<text x='0' y='{row * 22 + 17}' font-size='13'>{html.escape(name)}</text>"
        for row, name in enumerate(names)
    ]
    return _svg(970, len(names) * 22 + 8, bars + labels)


def _timeline(values: Sequence[float]) -> str:
    top, step = max(values) or 1.0, 960 / max(len(values) - 1, 1)
    points = " ".join(f"{i * step:.1f},{120 - 110 * v / top:.1f}" for i, v in enumerate(values))
    line = f"<polyline points='{points}' fill='none' stroke='{_COLOURS[0]}'/>"
    return _svg(970, 130, [line, f"<text x='0' y='12' font-size='12'>{top:.2f} ms</text>"])


def _histogram(values: Sequence[float], bins: int = 40) -> str:
    low, high = min(values), max(values)
    width = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / width), bins - 1)] += 1
    bars = [
        f"<rect x='{i * 24}' y='{110 - 100 * n / max(counts):.1f}' width='22' "
        f"height='{100 * n / max(counts):.1f}' fill='{_COLOURS[0]}'/>"
        for i, n in enumerate(counts)
    ]
    axis = [
        f"<text x='0' y='125' font-size='12'>{low:.2f} ms</text>",
        f"<text x='900' y='125' font-size='12'>{high:.2f} ms</text>",
    ]
    return _svg(970, 130, bars + axis)


def _svg(width: int, height: int, elements: Sequence[str]) -> str:
    return f"<svg width='{width}' height='{height}' role='img'>{''.join(elements)}</svg>"
