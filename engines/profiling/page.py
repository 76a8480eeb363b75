"""A profile as one self-contained HTML file: nothing is loaded from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from edgevlm.engines.profiling import drawings, forms, tables
from edgevlm.engines.profiling.forms import Shown

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
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:.3em 1.5em;background:#f6f6f6;"
    "padding:1em}dt{color:#555}dd{margin:0}"
    "pre{white-space:pre-wrap}td.word{text-align:left}"
    ".whole td{white-space:nowrap}.muted{color:#777}details{margin:1em 0}.wide{overflow-x:auto}"
)


def as_html(profiles: Sequence[Shown], count: int = 40) -> str:
    """One page with everything in it: figures, waterfall, times, roofline, memory, layers."""
    body = "".join(_section(p, count) for p in profiles)
    if len(profiles) > 1:
        together, drawn = _html_table(tables.columns(profiles), tables.compared(profiles)), ""
        engines = [p.engine for p in profiles]
        for figure in forms.of(profiles[0]).figures:
            values = [getattr(p, figure.field) for p in profiles]
            drawn += _bars(engines, figure.title, values, figure.unit)
        body = f"<h2>Comparison</h2><div class='wide whole'>{together}</div>{drawn}{body}"
    screen = "<meta name=viewport content='width=device-width,initial-scale=1'>"
    return f"{HEAD}{screen}<style>{_STYLE}</style><h1>edgevlm profile</h1>{body}"


def _section(p: Shown, count: int) -> str:
    form = forms.of(p)
    device = ", ".join(f"{key} {value}" for key, value in p.device.items())
    title, times = form.series(p)
    parts = [
        f"<h2>{html.escape(p.engine)}</h2><p class=muted>{html.escape(device)}</p>",
        _figures(forms.totals(p)),
        f"<h3>One {form.request}, stage by stage</h3>{drawings.waterfall(p)}{_stages(p)}",
        f"<h3>{html.escape(title)}</h3>{drawings.timeline(times)}",
    ]
    if form.often:
        parts.append(f"<h3>How often each latency</h3>{drawings.histogram(times)}")
    parts += [_metrics(p), _limits(p)]
    if picture := drawings.memory(p):
        parts.append(f"<h3>Memory over time</h3>{picture}")
    if p.layers:
        parts.append(f"<h3>Slowest layers</h3>{_layers(p, count)}")
    return "".join([*parts, _context(p.context)])


def _figures(lines: Sequence[str]) -> str:
    """Lines of a name and what it is, as a list."""
    pairs = (line.partition("  ") for line in lines)
    told = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value.strip())}</dd>"
        for name, _, value in pairs
    )
    return f"<dl>{told}</dl>"


def _stages(p: Shown) -> str:
    """A table of the stages."""
    rows = [(n, s.p50_ms, s.p90_ms, s.p99_ms, s.mean_ms) for n, s in p.stages.items()]
    return _html_table(("stage", "p50 ms", "p90 ms", "p99 ms", "mean ms"), rows)


def _metrics(p: Shown) -> str:
    """AIPerf's names; the stages have a table of their own."""
    if not p.metrics:
        return ""
    columns = ("metric", "unit", "mean", "std", "min", "p50", "p90", "p95", "p99", "max")
    rows = [
        (name, d.unit, d.mean, d.std, d.min, d.p50, d.p90, d.p95, d.p99, d.max)
        for name, d in p.metrics.items()
        if name not in p.stages
    ]
    return f"<h3>Metrics</h3><div class=wide>{_html_table(columns, rows)}</div>"


def _limits(p: Shown) -> str:
    """The roofline, drawn and as a table."""
    return (
        f"<h3>Against the machine's limits (measured: {p.roofline.peak_gflop_s:.0f} GFLOP/s, "
        f"{p.roofline.peak_int8_gop_s:.0f} GOP/s in 8 bits, "
        f"{p.roofline.peak_gb_s:.1f} GB/s)</h3>{drawings.roofline([p])}{_roofs(p)}"
    )


def _roofs(p: Shown) -> str:
    rows = [
        (b.stage, b.gflops, b.gbytes, b.kv_gbytes, b.floor_ms, b.limited_by, f"{b.reached:.0%}")
        for b in p.roofline.stages
    ]
    columns = ("stage", "GFLOP", "GB moved", "of it KV cache", "floor ms", "limited by", "reached")
    return _html_table(columns, rows)


def _layers(p: Shown, count: int) -> str:
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
        _html_table(("component", "kind of op", "ms", "share"), by_kind)
        + "<div class=wide>"
        + _html_table(("component", "layer", "op", "calls", "ms", "share"), rows[:count])
        + "</div>"
    )


def _context(given: Mapping[str, object]) -> str:
    """What figures depend on, as a table."""
    if not given:
        return ""
    rows = [(key, _told(value)) for key, value in given.items()]
    return (
        "<details open><summary>What these figures depend on</summary>"
        f"{_html_table(('what', 'value'), rows)}</details>"
    )


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(item)}" for key, item in value.items())
    return "unknown" if value is None else str(value)


def _bars(engines: Sequence[str], what: str, values: Sequence[float], unit: str) -> str:
    """A figure of each engine beside the others'."""
    longest = max(values) or 1.0
    drawn = [
        f"<text x='0' y='{24 * i + 16}'>{html.escape(_short(engine))}</text>"
        f"<rect x='220' y='{24 * i + 3}' width='{600 * v / longest:.1f}' height='17' "
        f"fill='{drawings.colour(i)}'/>"
        f"<text x='{228 + 600 * v / longest:.1f}' y='{24 * i + 16}'>{v:.4g} {unit}</text>"
        for i, (engine, v) in enumerate(zip(engines, values, strict=True))
    ]
    return f"<h3>{what}</h3>{drawings.svg(970, 24 * len(values) + 6, drawn)}"


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; values are escaped."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    cells = "".join("<tr>" + "".join(_html_cell(value) for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>"


def _html_cell(value: object) -> str:
    """Figures to the right, words to the left."""
    if isinstance(value, str) and any(map(str.isalpha, value)) and "e-" not in value:
        return f"<td class=word>{html.escape(value)}</td>"
    return f"<td>{html.escape(tables.plain(value))}</td>"
