"""Our server and llama.cpp's, asked the same by the same clients, with the same number of slots.

Both read the checkpoint of benchmarks.compare. All servers run from the beginning to the end, an
idle one uses no processor; they are asked in turn, in rounds, once each of their slots has answered
a question. Both keep what a slot has read, and go on from there where the next prompt begins in the
same way. llama.cpp reads an image anew for a slot that held another one; ours is given the features
and the KV rows that are there. With `--pictures 1` no server reads an image twice.
"""

from __future__ import annotations

import http.client
import math
import socket
import subprocess
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Bar, Report, spread, wait_until_quiet
from benchmarks.compare_peers import programs
from benchmarks.compare_peers.place import Place, Setting, Unavailable, told
from benchmarks.compare_peers.programs import LLAMA
from benchmarks.compare_peers.side import PIXELS
from benchmarks.serving import second_question, served
from benchmarks.serving_clients import Reply, Run, Server, load, questions

SIZE = (PIXELS, PIXELS)  # what the encoder takes, so that nobody resizes
CONTEXT = int(programs.CONTEXT)  # of a slot
GREEDY = ("--samplers", "top_k", "--top-k", "1")  # the cheapest way to the likeliest token
OPENING_S = 120.0


@dataclass
class Side:
    """A server and what was measured on it."""

    server: Server
    ours: bool
    alone: list[Reply] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    runs: dict[int, list[Run]] = field(default_factory=dict)


# -- llama.cpp's server --------------------------------------------------------------------------


@contextmanager
def llama_served(place: Place, setting: Setting, options: Namespace) -> Iterator[Server]:
    """A server of a language model and its projector; stopped at the end."""
    binary, port = programs.llama_server(place), _free_port()
    slots, threads = str(options.slots), str(options.threads)
    command: list[str | Path] = [binary, "-m", setting.model, "--host", "127.0.0.1"]
    command += ["--mmproj", setting.words["projector"], "--port", str(port), "-t", threads]
    command += ["-tb", threads, "-np", slots, "-c", str(CONTEXT * options.slots), *GREEDY]
    with (place.work / f"llama-server {setting.model.stem}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
        try:
            _wait(process, port, log.name)
            yield Server(f"llama.cpp {setting.name}", process, port)
        finally:
            process.terminate()
            process.wait()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _wait(process: subprocess.Popen[str], port: int, log: str) -> None:
    """Return when the server takes requests."""
    begin = time.perf_counter()
    while process.poll() is None and time.perf_counter() - begin < OPENING_S:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.2)
    last = Path(log).read_text(errors="replace").splitlines()[-3:]
    raise SystemExit("llama.cpp's server does not start: " + " / ".join(last))


# -- measuring -----------------------------------------------------------------------------------


def prepared(place: Place, options: Namespace) -> tuple[list[Path], list[Setting]]:
    """Our engines and llama.cpp's models, and its server; Unavailable if they cannot be made."""
    engines = list(options.engine or ())
    if not engines:
        engines = [setting.model for setting in programs.edgevlm(place, options.ours)]
    settings = programs.llama(place, options.theirs)
    programs.llama_server(place)
    return engines, settings


def beside(options: Namespace, folder: Path) -> bool:
    """Prepare, measure in turn, print; whether the bars hold."""
    place = Place(folder)
    try:
        engines, settings = prepared(place, options)
    except Unavailable as reason:
        raise SystemExit(f"llama.cpp's server cannot be had here: {reason}") from None
    if options.prepare:
        return True
    bodies = questions(options.tokens, SIZE, pictures=options.pictures)
    short = questions(2, SIZE, pictures=options.pictures)
    with ExitStack() as opened:
        sides = [Side(opened.enter_context(served(e, options))[0], ours=True) for e in engines]
        for setting in settings:
            server = opened.enter_context(llama_served(place, setting, options))
            sides.append(Side(server, ours=False))
        for side in sides:
            told(f"{side.server.name}: each question alone")
            side.first, side.second = second_question(side.server, options, SIZE)
            side.alone = [side.server.ask(body) for body in bodies]
            load(side.server, short, options.slots, 1)  # every slot has read an image then
        rounds(sides, bodies, options)
        return report(sides, options).finish(options)


def rounds(sides: Sequence[Side], bodies: Sequence[bytes], options: Namespace) -> None:
    """All numbers of clients on all servers, in turn."""
    for number in range(options.rounds):
        for clients in options.clients:
            for side in sides:
                told(f"round {number + 1} of {options.rounds}: {side.server.name}, {clients}")
                wait_until_quiet(options.patience)
                each = max(math.ceil(options.answers / options.rounds / clients), 1)
                run = load(side.server, bodies, clients, each)
                side.runs.setdefault(clients, []).append(run)


def report(sides: Sequence[Side], options: Namespace) -> Report:
    """Medians over rounds, and their range; ours beside each of theirs."""
    columns = ("server", "clients", "tokens/s", "first token p50, ms", "a token p50, ms")
    result = Report(
        f"serving_beside_llama{options.label}", (*columns, "CPU ms a token", "MB"), ("edgevlm",)
    )
    result.measured = {"llama-cpp-python": LLAMA, "slots": options.slots}
    result.measured |= {"threads": options.threads, "tokens": options.tokens}
    result.measured |= {"pictures": options.pictures}
    for side in sides:
        result.measured[side.server.name] = _figures(side)
        for clients, runs in side.runs.items():
            found = [run.figures() for run in runs]
            cells = [spread([one[name] for one in found], 1) for name in SHOWN]
            peak = max(run.peak_mb for run in runs)
            result.rows.append((side.server.name, clients, *cells, round(peak)))
    result.notes = [_note(side) for side in sides]
    result.bars = _bars(sides)
    return result


SHOWN = (
    *("tokens_per_s", "time_to_first_token_p50_ms", "inter_token_latency_p50_ms"),
    "cpu_ms_a_token",
)


def _figures(side: Side) -> dict[str, Any]:
    runs = {f"{n} clients": [run.figures() for run in runs] for n, runs in side.runs.items()}
    return runs | {
        "prompt_tokens": sorted({reply.prompt_tokens for reply in side.alone}),
        "first_ms": [round(x, 1) for x in side.first],
        "second_ms": [round(x, 1) for x in side.second],
    }


def _note(side: Side) -> str:
    """What belongs beside the rates: other times, and whether all did the same work."""
    every = [run for runs in side.runs.values() for run in runs]
    prompts = "-".join(str(n) for n in sorted({reply.prompt_tokens for reply in side.alone}))
    lengths = sorted({reply.tokens for run in every for _, reply in run.answers})
    lost = sum(run.asked - len(run.answers) for run in every)
    return (
        f"{side.server.name}: first token about a new image {np.median(side.first):.0f} ms, of a "
        f"second question {np.median(side.second):.0f} ms; prompts of {prompts} tokens, answers "
        f"of {lengths[0]}-{lengths[-1]}, {lost} lost"
    )


def _bars(sides: Sequence[Side]) -> list[Bar]:
    """The fastest of ours over each of theirs, for every number of clients but one.

    What one client gets is compared by benchmarks.compare.
    """
    bars = []
    for clients in sides[0].runs.keys() - {1}:
        rates = {
            side.server.name: float(np.median([run.tokens_per_s for run in side.runs[clients]]))
            for side in sides
        }
        best = max((rates[side.server.name], side.server.name) for side in sides if side.ours)
        for side in sides:
            if not side.ours:
                name = side.server.name
                what = f"tokens/s, {clients} clients: {best[1]} / {name}"
                bars.append(Bar(what, best[0] / rates[name], 1.0, at_least=True))
    return bars
