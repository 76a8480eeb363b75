"""How long commands take that do next to nothing.

`edgevlm --help`, and `edgevlm run` of a tiny model: start, load, read an image, answer with
24 tokens. Beside them: a bare Python interpreter, and the imports that transformers needs before
it can do the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import (
    EDGEVLM,
    ROOT,
    Bar,
    Finished,
    Report,
    child,
    edgevlm,
    parser,
    spread,
    version,
    wait_until_quiet,
    workplace,
)

CASE = ROOT / "tests" / "goldens" / "e2e_llava15"
PEER_IMPORTS = "import torch; from transformers import LlavaForConditionalGeneration"
Command = Callable[[], Finished]


def commands(engine: Path) -> dict[str, Command]:
    """What is timed."""
    question = [str(engine), "What is this?", "--image", str(CASE / "image.png")]
    timed: dict[str, Command] = {
        "python -c pass": lambda: child([sys.executable, "-c", "pass"]),
        "edgevlm --help": lambda: child([*EDGEVLM, "--help"]),
        "edgevlm run, tiny": lambda: edgevlm("run", *question, "--max-tokens", "24"),
    }
    if version("transformers"):
        timed["transformers, imports"] = lambda: child([sys.executable, "-c", PEER_IMPORTS])
    return timed


def measure(engine: Path, rounds: int) -> dict[str, list[Finished]]:
    """Every command in turn, `rounds` times, after one round that warms the file cache."""
    timed = commands(engine)
    finished: dict[str, list[Finished]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, command in timed.items():
            wait_until_quiet(10)
            done = command()
            if number:
                finished[name].append(done)
    return finished


def report(finished: dict[str, list[Finished]]) -> Report:
    """Medians and bars."""
    result = Report(
        "start_up",
        ("command", "seconds", "peak MB"),
        ("edgevlm", "typer", "numpy", "onnxruntime", "torch", "transformers"),
    )
    medians = {}
    for name, runs in finished.items():
        seconds = spread([run.seconds for run in runs])
        memory = spread([run.peak_rss_mb for run in runs], 0)
        result.rows.append((name, seconds, memory))
        result.measured[name] = {"seconds": seconds, "peak_rss_mb": memory}
        medians[name] = seconds.median
    result.bars = [
        Bar("edgevlm --help, seconds", medians["edgevlm --help"], 0.3),
        Bar("edgevlm run on a tiny engine, seconds", medians["edgevlm run, tiny"], 1.5),
    ]
    if "transformers, imports" in medians:
        ratio = medians["edgevlm run, tiny"] / medians["transformers, imports"]
        result.bars.append(Bar("whole run / transformers' imports alone", ratio, 1.0))
    return result


def run(options: argparse.Namespace) -> bool:
    """Build the tiny engine and time everything."""
    with workplace(options) as work:
        bundle, engine = work / "tiny", work / "tiny-engine"
        tower = ("--vision-tower", CASE / "clip-vit-tiny")
        edgevlm("export", CASE / "llava-v1.5-tiny", bundle, *tower, "--force")
        edgevlm("build", bundle, engine, "--force")
        return report(measure(engine, options.rounds)).finish(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold."""
    command_line = parser(__doc__)
    command_line.add_argument("--rounds", type=int, default=7)
    return 0 if run(command_line.parse_args(arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
