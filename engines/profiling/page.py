"""A profile as one self-contained HTML file: nothing is loaded from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from edgevlm.engines.profiling import drawings
from edgevlm.engines.profiling.profile import Profile
from edgevlm.engines.profiling.tables import COMPARED, compared, plain, totals
from edgevlm.engines.profiling.tower import TowerProfile

Shown = Profile | TowerProfile
HEAD = "<!doctype html><meta charset=utf-8><title>edgevlm</title>"
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;"
    "color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;text-align:right;"
    "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
    "tbody tr:hover{background:#f6f8fb}"
    "svg{display:block;margin:.5em 0 1.5em;max-width:100%;height:auto}svg text{font-size:12px}"
    ".grid{stroke:#e4e4e4}.roof{stroke:#222;stroke-width:1.5}.area{fill:#3266ad;opacity:.35}"
    "pre{background:#f6f6f6;padding:1em;overflow:auto}"
    "h2{margin-top:2em;border-top:2px solid #222;padding-top:.6em;overflow-wrap:anywhere}"
    "pre{white-space:pre-wrap}td.word{text-align:left}"
    ".muted{color:#777}details{margin:1em 0}.wide{overflow-x:auto}"
)


def as_html(profiles: Sequence[Profile], count: int = 40) -> str:
    """One page with everything in it: figures, waterfall, latencies, roofline, memory, layers."""
    body = "".join(_section(p, count) for p in profiles)
    if len(profiles) > 1:
        together = html_table(COMPARED, compared(profiles))
        values = {
            "time to first token": [p.time_to_first_token_ms for p in profiles],
            "inter-token latency": [p.inter_token_latency_ms for p in profiles],
        }
        drawn = bars([p.engine for p in profiles], values, "ms")
        body = f"<h2>Comparison</h2>{together}{drawn}{body}"
    return document(body)


def document(body: str) -> str:
    """A whole page."""
    return f"{HEAD}<style>{_STYLE}</style><h1>edgevlm profile</h1>{body}"


def _section(p: Profile, count: int) -> str:
    device = ", ".join(f"{key} {value}" for key, value in p.device.items())
    parts = [
        f"<h2>{html.escape(p.engine)}</h2><p class=muted>{html.escape(device)}</p>",
        f"<pre>{html.escape(chr(10).join(totals(p)))}</pre>",
        f"<h3>One question, stage by stage</h3>{drawings.waterfall(p)}{stages(p)}",
        f"<h3>Milliseconds per token, in order</h3>{drawings.timeline(p.samples['decode'])}",
        f"<h3>How often each latency</h3>{drawings.histogram(p.samples['decode'])}",
        metrics(p),
        limits(p),
    ]
    if picture := drawings.memory(p):
        parts.append(f"<h3>Memory over time</h3>{picture}")
    if p.layers:
        parts.append(f"<h3>Slowest layers</h3>{layers(p, count)}")
    return "".join([*parts, context(p.context)])


def stages(p: Shown) -> str:
    """A table of the stages."""
    rows = [(n, s.p50_ms, s.p90_ms, s.p99_ms, s.mean_ms) for n, s in p.stages.items()]
    return html_table(("stage", "p50 ms", "p90 ms", "p99 ms", "mean ms"), rows)


def metrics(p: Shown) -> str:
    """AIPerf's names; the stages have a table of their own."""
    if not p.metrics:
        return ""
    columns = ("metric", "unit", "mean", "std", "min", "p50", "p90", "p95", "p99", "max")
    rows = [
        (name, d.unit, d.mean, d.std, d.min, d.p50, d.p90, d.p95, d.p99, d.max)
        for name, d in p.metrics.items()
        if name not in p.stages
    ]
    return f"<h3>Metrics</h3><div class=wide>{html_table(columns, rows)}</div>"


def limits(p: Shown) -> str:
    """The roofline, drawn and as a table."""
    fp8 = p.roofline.peak_fp8_gflop_s
    return (
        f"<h3>Against the machine's limits (measured: {p.roofline.peak_gflop_s:.0f} GFLOP/s, "
        f"{p.roofline.peak_int8_gop_s:.0f} GOP/s in 8 bits, "
        f"{f'{fp8:.0f} GFLOP/s in FP8, ' if fp8 else ''}"
        f"{p.roofline.peak_gb_s:.1f} GB/s)</h3>{drawings.roofline([p])}{_roofs(p)}"
    )


def _roofs(p: Shown) -> str:
    rows = [
        (b.stage, b.gflops, b.gbytes, b.kv_gbytes, b.floor_ms, b.limited_by, f"{b.reached:.0%}")
        for b in p.roofline.stages
    ]
    columns = ("stage", "GFLOP", "GB moved", "of it KV cache", "floor ms", "limited by", "reached")
    return html_table(columns, rows)


def layers(p: Shown, count: int) -> str:
    """The slowest nodes, and all time by kind of op."""
    whole = sum(layer.ms for layer in p.layers) or 1.0
    kinds: dict[tuple[str, str], float] = {}
    for layer in p.layers:
        key = (layer.component, layer.op)
        kinds[key] = kinds.get(key, 0.0) + layer.ms
    top = sorted(kinds.items(), key=lambda item: -item[1])[:12]
    by_kind = [(component, op, ms, f"{ms / whole:.0%}") for (component, op), ms in top]
    rows = [(s.component, s.name, s.op, s.calls, s.ms, f"{s.ms / whole:.1%}") for s in p.layers]
    return (
        html_table(("component", "kind of op", "ms", "share"), by_kind)
        + "<div class=wide>"
        + html_table(("component", "layer", "op", "calls", "ms", "share"), rows[:count])
        + "</div>"
    )


def context(given: Mapping[str, object]) -> str:
    """What figures depend on, as a table."""
    if not given:
        return ""
    rows = [(key, _told(value)) for key, value in given.items()]
    return (
        "<details open><summary>What these figures depend on</summary>"
        f"{html_table(('what', 'value'), rows)}</details>"
    )


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(item)}" for key, item in value.items())
    return "unknown" if value is None else str(value)


def bars(engines: Sequence[str], figures: Mapping[str, Sequence[float]], unit: str) -> str:
    """Figures of each engine beside the others', by what they are."""
    parts = []
    for what, values in figures.items():
        longest = max(values) or 1.0
        drawn = [
            f"<text x='0' y='{24 * i + 16}'>{html.escape(_short(engine))}</text>"
            f"<rect x='220' y='{24 * i + 3}' width='{600 * v / longest:.1f}' height='17' "
            f"fill='{drawings.colour(i)}'/>"
            f"<text x='{228 + 600 * v / longest:.1f}' y='{24 * i + 16}'>{v:.4g} {unit}</text>"
            for i, (engine, v) in enumerate(zip(engines, values, strict=True))
        ]
        parts.append(f"<h3>{what}</h3>{drawings.svg(970, 24 * len(values) + 6, drawn)}")
    return "".join(parts)


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; values are escaped."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    cells = "".join("<tr>" + "".join(_html_cell(value) for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>"


def _html_cell(value: object) -> str:
    """Figures to the right, words to the left."""
    if isinstance(value, str) and any(map(str.isalpha, value)) and "e-" not in value:
        return f"<td class=word>{html.escape(value)}</td>"
    return f"<td>{html.escape(plain(value))}</td>"
