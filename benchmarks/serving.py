"""A server under load: tokens/s of one client and of eight, fifty clients, the second question.

    python -m benchmarks.serving --work FOLDER       # makes a model of 0.5B shapes, random weights
    python -m benchmarks.serving --engine ENGINE     # an engine that is there

Every question is asked once alone; then all clients ask all the time, and each answer must be the
one that the same question got alone. Bars: eight clients get 2.5 x the tokens/s of one; a second
question about an image has its first token after at most 0.15 x the first one's time; no answer
differs; memory grows by less than a tenth between the first answers and the last.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    EDGEVLM,
    ROOT,
    Bar,
    Moment,
    Report,
    edgevlm,
    parser,
    wait_until_quiet,
    workplace,
)

PRESET = ("preset:llava-qwen2-0.5b", "--random-weights", "--max-context", "1024")
SUBJECTS = (
    "colour",
    "shape",
    "size",
    "number",
    "place",
    "weather",
    "people",
    "text",
    "time",
    "use",
)


@dataclass(frozen=True)
class Reply:
    """What a client got."""

    text: str
    tokens: int
    timings_ms: dict[str, float]


class Server:
    """`edgevlm serve` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._process = process
        said = json.loads(process.stdout.readline())
        self.port, self.rows_together = int(said["url"].rsplit(":", 1)[1]), said["rows_together"]

    def ask(self, body: bytes) -> Reply:
        """One question, from its connection to its last token."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=900)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        found = json.loads(response.read())
        connection.close()
        if response.status != 200:
            sys.exit(f"the server answered {response.status}: {found}")
        text = found["choices"][0]["message"]["content"]
        return Reply(text, found["usage"]["completion_tokens"], found["edgevlm"]["timings_ms"])

    def rss_mb(self) -> float:
        """Memory that the process holds now."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@contextmanager
def served(engine: Path, options: Namespace) -> Iterator[Server]:
    """A server of an engine, stopped at the end."""
    settings = ("--port", "0", "--json", "--slots", str(options.slots), "--queue", "100")
    command = [*EDGEVLM, "serve", str(engine), *settings, "--threads", str(options.threads)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}
    )
    try:
        yield Server(process)
    finally:
        process.terminate()
        process.wait()


def picture(seed: int) -> str:
    """A random image as a data URL."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((640, 480)).save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def question(subject: str, url: str, tokens: int) -> bytes:
    """A request about an image."""
    text = {"type": "text", "text": f"Describe the {subject} in this image."}
    parts = [{"type": "image_url", "image_url": {"url": url}}, text]
    messages = [{"role": "user", "content": parts}]
    return json.dumps({"messages": messages, "max_tokens": tokens}).encode()


@dataclass
class Run:
    """A number of clients that asked all the time."""

    clients: int
    answers: list[tuple[int, Reply]]
    seconds: float
    elsewhere: float

    @property
    def tokens_per_s(self) -> float:
        """Of all clients together."""
        return sum(reply.tokens for _, reply in self.answers) / self.seconds

    def percentile(self, stage: str, percent: float) -> float:
        """Milliseconds of a stage."""
        values = [reply.timings_ms.get(stage, 0.0) for _, reply in self.answers]
        return float(np.percentile(values, percent))


def load(server: Server, bodies: Sequence[bytes], clients: int, each: int) -> Run:
    """`clients` at once, each asking `each` questions one after the other."""
    answers: list[tuple[int, Reply]] = []

    def client(number: int) -> None:
        for at in islice(cycle(range(len(bodies))), number, number + each):
            answers.append((at, server.ask(bodies[at])))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    since = Moment.now()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Run(clients, answers, time.perf_counter() - since.at_s, since.share_elsewhere())


def second_question(server: Server, options: Namespace) -> tuple[list[float], list[float]]:
    """Times to the first token in ms: of questions about new images, and of second ones."""
    first, second = list[float](), list[float]()
    for seed in range(100, 100 + options.images):
        url = picture(seed)
        for subject, times in (("colour", first), ("shape", second)):
            wait_until_quiet(options.patience)
            reply = server.ask(question(subject, url, 2))
            times.append(reply.timings_ms["time_to_first_token"])
    return first, second


def measure(engine: Path, options: Namespace) -> Report:
    """All runs on one server."""
    report = Report(
        f"serving_{engine.name}",
        (
            "clients",
            "answers",
            "tokens/s",
            "first token p50, ms",
            "a token p50, ms",
            "queue p99, ms",
        ),
        ("edgevlm", "onnxruntime", "uvicorn", "fastapi"),
    )
    urls = [picture(0), picture(1)]
    bodies = [
        question(subject, urls[number % 2], options.tokens)
        for number, subject in enumerate(SUBJECTS)
    ]
    with served(engine, options) as server:
        first, second = second_question(server, options)
        alone = [server.ask(body) for body in bodies]
        held = server.rss_mb()
        runs = []
        for clients in options.clients:
            wait_until_quiet(options.patience)
            runs.append(load(server, bodies, clients, max(options.answers // clients, 1)))
        grown = server.rss_mb() / held
        report.measured["rows_together"] = server.rows_together
    wrong = sum(reply.text != alone[at].text for run in runs for at, reply in run.answers)
    for run in runs:
        stages = [
            run.percentile(name, 50) for name in ("time_to_first_token", "inter_token_latency")
        ]
        queue = run.percentile("queue", 99)
        report.rows.append((run.clients, len(run.answers), run.tokens_per_s, *stages, queue))
        report.measured[f"{run.clients} clients"] = {
            "tokens_per_s": round(run.tokens_per_s, 2),
            "time_to_first_token_p50_ms": round(stages[0], 1),
            "inter_token_latency_p50_ms": round(stages[1], 2),
            "queue_p99_ms": round(queue, 1),
            "seconds": round(run.seconds, 1),
            "elsewhere": round(run.elsewhere, 3),
        }
    ratio = statistics.median(second) / statistics.median(first)
    report.measured |= {"first_ms": first, "second_ms": second, "slots": options.slots}
    report.notes = [
        f"first token about a new image {statistics.median(first):.0f} ms, of a second question "
        f"{statistics.median(second):.0f} ms; memory {held:.0f} MB, then {grown:.3f} x"
    ]
    report.bars = [
        Bar("answers that differ from those alone", wrong, 0.5),
        Bar("first token of a second question / of the first", ratio, 0.15),
        Bar("memory after / before", grown, 1.1),
    ]
    by_clients = {run.clients: run.tokens_per_s for run in runs}
    if {1, 8} <= set(by_clients):
        report.bars.append(Bar("tokens/s, 8 clients / 1", by_clients[8] / by_clients[1], 2.5, True))
    return report


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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold."""
    command_line = parser(__doc__)
    command_line.add_argument("--engine", type=Path, action="append", help="repeatable")
    command_line.add_argument("--clients", type=int, nargs="+", default=[1, 8, 50])
    command_line.add_argument("--answers", type=int, default=16, help="of each number of clients")
    command_line.add_argument("--tokens", type=int, default=64, help="of an answer")
    command_line.add_argument("--images", type=int, default=3, help="for the second question")
    command_line.add_argument("--slots", type=int, default=8)
    command_line.add_argument("--threads", type=int, default=2)
    command_line.add_argument("--patience", type=float, default=20.0, help="wait for quiet, s")
    options: Any = command_line.parse_args(arguments)
    with workplace(options) as folder:
        held = [measure(engine, options).finish(options) for engine in engines(options, folder)]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
