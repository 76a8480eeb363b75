"""A profile as rows and lines, which text, pages and other programs' tables share."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from edgevlm.engines.profiling.context import warnings
from edgevlm.engines.profiling.metrics import Distribution
from edgevlm.engines.profiling.profile import Profile
from edgevlm.engines.runtime.clock import Span
from edgevlm.toolkit.terminal.console import human_bytes

COMPARED = (
    *("engine", "precision", "size", "KL to the first", "same top-1"),
    *("first token ms", "ratio", "ms a token", "ratio", "peak MB"),
)
_CSV = ("engine", "precision", "metric", "unit")
_TRACE = {"displayTimeUnit": "ms", "made_by": "edgevlm profile"}
# What files that are written are known by later.
TRACE_BEGINS = json.dumps(_TRACE)[:-1]
CSV_BEGINS = ",".join(_CSV)
MARKDOWN_BEGINS = f"| {' | '.join(COMPARED)} |"
_FIGURES = ("mean", "std", "min", "p50", "p90", "p95", "p99", "max", "count")
CSV_COLUMNS = (*_CSV, *_FIGURES)
AFTER_ANSWER = "segmenter."  # what stages behind an answer begin with


def totals(p: Profile) -> list[str]:
    """The figures that people quote, a line each."""
    decode = next(b for b in p.roofline.stages if b.stage == "decode")
    return [
        f"time to first token    {p.time_to_first_token_ms:.1f} ms "
        f"({p.prompt_tokens} prompt tokens, {p.image_tokens} of them image)",
        f"inter-token latency    {p.inter_token_latency_ms:.2f} ms "
        f"({p.output_token_throughput_per_user:.1f} tokens/s)",
        f"prefill                {p.prefill_tokens_per_s:.0f} tokens/s",
        *_masks(p),
        f"load / peak memory     {p.load_ms:.0f} ms / {p.peak_rss_mb:.0f} MB",
        f"speed of light         {decode.gbytes:.3g} GB of weights and KV cache a token "
        f"at the measured {p.roofline.peak_gb_s:.3g} GB/s: "
        f"{_rate(1000 / max(decode.floor_ms, 1e-9))} tokens/s at best",
        f"device                 {p.device.get('card') or p.device['processor']}, "
        f"{p.device['threads']} threads, "
        f"{p.device['target']}, {p.device['precision']}",
        *(f"warning                {line}" for line in warnings(p.context)),
    ]


def of_first_token(stage: str, ms: float, p: Profile) -> str:
    """The share of the first token's time that a stage takes; nothing of a later one."""
    if stage == "decode" or stage.startswith(AFTER_ANSWER):
        return ""
    return f"{ms / p.time_to_first_token_ms:.0%}"


def _masks(p: Profile) -> list[str]:
    """A line on what a mask takes behind the answer, if the model makes any."""
    stages = [s.p50_ms for name, s in p.stages.items() if name.startswith(AFTER_ANSWER)]
    line = f"one mask               {sum(stages):.1f} ms, behind the answer"
    return [line] if stages else []


def _rate(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def compared(profiles: Sequence[Profile]) -> list[tuple[object, ...]]:
    """A row per engine, in the columns of COMPARED; ratios and drift are to the first."""
    base, rows = profiles[0], list[tuple[object, ...]]()
    for p in profiles:
        drift = p.drift
        rows.append(
            (
                p.engine,
                p.device["precision"],
                human_bytes(p.size_bytes),
                "-" if drift is None else f"{drift.kl:.3g}",
                "-" if drift is None else f"{drift.top1:.0%}",
                p.time_to_first_token_ms,
                p.time_to_first_token_ms / base.time_to_first_token_ms,
                p.inter_token_latency_ms,
                p.inter_token_latency_ms / base.inter_token_latency_ms,
                p.peak_rss_mb,
            )
        )
    return rows


def as_csv(profiles: Sequence[Profile]) -> str:
    """A line per engine and metric, for spreadsheets."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for p in profiles:
        single = (
            ("load", "ms", p.load_ms),
            ("peak_rss", "MB", p.peak_rss_mb),
            ("engine_size", "bytes", p.size_bytes),
        )
        for row in csv_rows(p.metrics, single):
            writer.writerow((p.engine, p.device["precision"], *row))
    return text.getvalue()


def csv_rows(
    found: Mapping[str, Distribution], single: Iterable[tuple[str, str, float]]
) -> Iterator[tuple[object, ...]]:
    """Metric, unit and figures of each metric, and of single values, (name, unit, value)."""
    for name, metric in found.items():
        yield (name, metric.unit, *(getattr(metric, figure) for figure in _FIGURES))
    for name, unit, value in single:
        yield (name, unit, value, 0, *([value] * 6), 1)


def as_markdown(profiles: Sequence[Profile]) -> str:
    """Tables for a comment in a discussion."""
    first = profiles[0]
    stages = [
        (
            name,
            plain(s.p50_ms),
            plain(s.p90_ms),
            plain(s.p99_ms),
            of_first_token(name, s.p50_ms, first),
        )
        for name, s in first.stages.items()
    ]
    rows = [tuple(plain(value) for value in row) for row in compared(profiles)]
    parts = [
        markdown(COMPARED, rows),
        f"Stages of {escaped(first.engine)}: {first.prompt_tokens} prompt tokens, "
        f"{first.generated_tokens} generated.\n",
        markdown(("stage", "p50 ms", "p90 ms", "p99 ms", "of first token"), stages),
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


class Traced(Protocol):
    """A profile of either kind. memory: (ms, MB), memory_marks: (ms, what began)."""

    @property
    def engine(self) -> str: ...

    @property
    def spans(self) -> Sequence[Span]: ...

    @property
    def device(self) -> dict[str, str]: ...

    @property
    def memory(self) -> Sequence[tuple[float, float]]: ...

    @property
    def memory_marks(self) -> Sequence[tuple[float, str]]: ...


def trace(p: Traced) -> str:
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
