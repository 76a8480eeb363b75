"""A server under load: tokens/s of one client and of eight, fifty clients, the second question.

    python -m benchmarks.serving --work FOLDER       # makes a model of 0.5B shapes, random weights
    python -m benchmarks.serving --engine ENGINE     # an engine that is there
    python -m benchmarks.serving --work FOLDER --beside llama.cpp     # and llama.cpp's server

Every question is asked once alone; then all clients ask all the time, and each answer must be the
one that the same question got alone. Where there are more clients than slots, answers come with the
probability of every token, and these must be the same too: random weights speak in tokens that
have no text. Bars: eight clients get 2.5 x the tokens/s of one; a second question about an image
has its first token after at most 0.15 x the first one's time; no answer differs and none is lost;
memory is never more than a tenth above what it was after each question had been asked alone.

--beside llama.cpp makes the model of benchmarks.compare for both programs (--work is its folder
then), builds llama.cpp's server from the sources that llama-cpp-python carries, and lets the same
clients ask both with the same number of slots, in turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import (
    EDGEVLM,
    ROOT,
    Bar,
    Report,
    edgevlm,
    parser,
    wait_until_quiet,
    workplace,
)
from benchmarks.serving_clients import Reply, Run, Server, load, picture, question, questions

PRESET = ("preset:llava-qwen2-0.5b", "--random-weights", "--max-context", "1024")
COLUMNS = (
    *("clients", "answers", "tokens/s", "first token p50, ms", "a token p50, ms"),
    *("queue p50, ms", "queue p99, ms", "MB"),
)


@contextmanager
def served(engine: Path, options: Namespace) -> Iterator[tuple[Server, int]]:
    """A server of an engine and its `rows_together`; stopped at the end."""
    settings = ("--port", "0", "--json", "--slots", str(options.slots), "--queue", "100")
    command = [*EDGEVLM, "serve", str(engine), *settings, "--threads", str(options.threads)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            port = int(said["url"].rsplit(":", 1)[1])
            yield Server(f"edgevlm {engine.name}", process, port), said["rows_together"]
        finally:
            process.terminate()


def second_question(
    server: Server, options: Namespace, size: tuple[int, int] = (640, 480)
) -> tuple[list[float], list[float]]:
    """Times to the first token in ms: of questions about new images, and of second ones."""
    first, second = list[float](), list[float]()
    for seed in range(100, 100 + options.images):
        url = picture(seed, size)
        for subject, times in (("colour", first), ("shape", second)):
            wait_until_quiet(options.patience)
            times.append(server.ask(question(subject, url, 2)).first_ms)
    return first, second


def measure(engine: Path, options: Namespace) -> Report:
    """All runs on one server."""
    packages = ("edgevlm", "onnxruntime", "uvicorn", "fastapi")
    report = Report(f"serving_{engine.name}{options.label}", COLUMNS, packages)
    few, many = min(options.clients), max(options.clients)
    plain, exact = (
        questions(options.tokens, pictures=options.pictures, logprobs=logprobs)
        for logprobs in (False, True)
    )
    runs, wrong = list[Run](), 0
    with served(engine, options) as (server, together):
        first, second = second_question(server, options)
        alone = [server.ask(body) for body in plain] if few <= options.slots else []
        exactly = [server.ask(body) for body in exact] if many > options.slots else []
        held = server.rss_mb()
        for clients in options.clients:
            wait_until_quiet(options.patience)
            bodies, wanted = (exact, exactly) if clients > options.slots else (plain, alone)
            run = load(server, bodies, clients, max(options.answers // clients, 1))
            runs.append(run)
            wrong += run.differing(wanted)
    for run in runs:
        figures = run.figures()
        report.measured[f"{run.clients} clients"] = figures
        report.rows.append((run.clients, *(figures[name] for name in SHOWN)))
    report.measured |= {"rows_together": together, "slots": options.slots}
    report.measured |= {"first_ms": first, "second_ms": second, "held_mb": round(held)}
    report.notes = _notes(first, second, held, exactly)
    report.bars = _bars(runs, wrong, median(second) / median(first), held)
    return report


SHOWN = (
    *("answers", "tokens_per_s", "time_to_first_token_p50_ms", "inter_token_latency_p50_ms"),
    *("queue_p50_ms", "queue_p99_ms", "peak_mb"),
)


def _notes(
    first: Sequence[float], second: Sequence[float], held: float, exactly: Sequence[Reply]
) -> list[str]:
    notes = [
        f"first token about a new image {median(first):.0f} ms, of a second question "
        f"{median(second):.0f} ms; memory {held:.0f} MB before the runs"
    ]
    if exactly:
        kinds = len({reply.said for reply in exactly})
        notes.append(f"{kinds} of {len(exactly)} questions have answers of their own")
    return notes


def _bars(runs: Sequence[Run], wrong: int, ratio: float, held: float) -> list[Bar]:
    bars = [
        Bar("answers that differ from those alone", wrong, 0.5),
        Bar("answers lost", sum(run.asked - len(run.answers) for run in runs), 0.5),
        Bar("first token of a second question / of the first", ratio, 0.15),
        Bar("most memory / before", max(run.peak_mb for run in runs) / held, 1.1),
    ]
    by_clients = {run.clients: run.tokens_per_s for run in runs}
    if {1, 8} <= set(by_clients):
        bars.append(Bar("tokens/s, 8 clients / 1", by_clients[8] / by_clients[1], 2.5, True))
    return bars


def engines(options: Namespace, folder: Path) -> list[Path]:
    """The engines that are asked for, made where there are none."""
    if options.engine:
        return list(options.engine)
    bundle = folder / "bundle-serving"
    if not bundle.exists():
        edgevlm("export", *PRESET, bundle)
    made = []
    for precision in ("int8", "int8-rows"):
        made.append(folder / f"engine-{precision}")
        edgevlm("build", bundle, made[-1], "--precision", precision)
    return made


def command_line() -> ArgumentParser:
    """Its options."""
    options = parser(__doc__)
    options.add_argument("--engine", type=Path, action="append", help="repeatable")
    options.add_argument("--clients", type=int, nargs="+", default=[1, 8, 50])
    options.add_argument("--answers", type=int, default=16, help="of each number of clients")
    options.add_argument("--tokens", type=int, default=64, help="of an answer")
    options.add_argument("--images", type=int, default=3, help="for the second question")
    options.add_argument("--pictures", type=int, default=2, help="that clients ask about")
    options.add_argument("--slots", type=int, default=8)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--patience", type=float, default=20.0, help="wait for quiet, s")
    options.add_argument("--label", default="", help="behind the name of the result")
    options.add_argument("--beside", choices=["llama.cpp"], help="compare with its server")
    options.add_argument("--ours", nargs="+", default=["int8", "int8-rows"], help="--beside: forms")
    options.add_argument("--theirs", nargs="+", default=["Q8_0"], help="--beside: forms")
    options.add_argument("--rounds", type=int, default=2, help="--beside: each program in turn")
    options.add_argument("--prepare", action="store_true", help="--beside: measure nothing")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold."""
    options: Any = command_line().parse_args(arguments)
    with workplace(options) as folder:
        if options.beside:
            from benchmarks.serving_beside import beside

            return 0 if beside(options, folder) else 1
        held = [measure(engine, options).finish(options) for engine in engines(options, folder)]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
