"""What `build --precision` changes: size, memory, load and speed of a whole model.

`preset:llava-qwen2-0.5b` in float32, int8 and int4 through `edgevlm profile`, each engine in a
process of its own, in turn. One image and 32 tokens of text in, 64 tokens out.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Bar,
    Report,
    edgevlm,
    parser,
    spread,
    wait_until_quiet,
    workplace,
)

PRECISIONS = ("float32", "int8", "int4")
PRESET = ("preset:llava-qwen2-0.5b", "--random-weights", "--max-context", "2048")
FIGURES = {
    "first_token_s": ("time_to_first_token_ms", 1e-3),
    "token_ms": ("inter_token_latency_ms", 1.0),
    "load_s": ("load_ms", 1e-3),
    "peak_rss_mb": ("peak_rss_mb", 1.0),
}


@dataclass
class Engine:
    """One engine and what was measured of it, a profile per round."""

    folder: Path
    weights_gb: float
    build_s: float
    profiles: list[dict[str, Any]] = field(default_factory=list)

    def figures(self, name: str) -> list[float]:
        """One figure of every round."""
        key, factor = FIGURES[name]
        return [profile[key] * factor for profile in self.profiles]


def prepare(work: Path) -> dict[str, Engine]:
    """The bundle, and an engine of it in every precision. Of random weights any loss will do."""
    bundle = work / "bundle-0.5b"
    if not bundle.exists():
        edgevlm("export", *PRESET, bundle)
    engines = {}
    for name in PRECISIONS:
        out = work / f"engine-{name}"
        words = () if name == "float32" else ("--precision", name, "--accept-loss", "1")
        result = json.loads(edgevlm("build", bundle, out, *words, "--json").stdout)
        files = [f["nbytes"] for n, f in result["files"].items() if n.endswith(".safetensors")]
        engines[name] = Engine(out, sum(files) / 1e9, result["build"]["seconds"])
    return engines


def measure(engines: dict[str, Engine], options: Namespace) -> None:
    """Every engine in turn, `rounds` times."""
    for _ in range(options.rounds):
        for engine in engines.values():
            wait_until_quiet(20)
            words = ("--runs", options.runs, "--json")
            done = edgevlm("profile", engine.folder, *map(str, words))
            engine.profiles.append(json.loads(done.stdout))


def report(engines: dict[str, Engine]) -> Report:
    """Medians, and ratios to float32 in the same run."""
    columns = ("precision", "weights GB", "first token s", "ms a token", "load s", "peak MB")
    result = Report("precision", columns, ("edgevlm", "onnxruntime", "numpy"))
    medians: dict[str, dict[str, float]] = {}
    for name, engine in engines.items():
        spreads = {figure: spread(engine.figures(figure)) for figure in FIGURES}
        result.rows.append((name, engine.weights_gb, *spreads.values()))
        sizes = {"weights_gb": round(engine.weights_gb, 3), "build_s": round(engine.build_s, 1)}
        result.measured[name] = sizes | spreads
        medians[name] = {figure: summary.median for figure, summary in spreads.items()}
    for name in PRECISIONS[1:]:
        ratios = {f: medians[name][f] / medians["float32"][f] for f in FIGURES}
        result.measured[f"{name} / float32"] = {f: round(x, 3) for f, x in ratios.items()}
        for figure in ("token_ms", "peak_rss_mb", "load_s"):
            result.bars.append(Bar(f"{figure}, {name} / float32", ratios[figure], 1.0))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold."""
    command_line = parser(__doc__)
    command_line.add_argument("--rounds", type=int, default=2, help="processes of each engine")
    command_line.add_argument("--runs", type=int, default=3, help="timed runs of each process")
    options = command_line.parse_args(arguments)
    with workplace(options) as work:
        engines = prepare(work)
        measure(engines, options)
        return 0 if report(engines).finish(options) else 1


if __name__ == "__main__":
    sys.exit(main())
