"""Clients of a server that speaks OpenAI's API, the same for every server: what they ask, and what
they measure on their own clock, from the request to the first token and to the last.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Moment

SUBJECTS = (
    *("colour", "shape", "size", "number", "place"),
    *("weather", "people", "text", "time", "use"),
)
PATIENCE_S = 900.0  # for an answer
SAMPLED_S = 0.25  # how often memory is looked at


class Lost(Exception):
    """A request without a whole answer."""


@dataclass(frozen=True)
class Reply:
    """What a client got. first_ms: from the request to the first token, total_ms: to the end of the
    answer; logprobs: of every token, where they were asked for; timings_ms: the server's own.
    """

    text: str
    logprobs: tuple[float, ...]
    tokens: int
    prompt_tokens: int
    first_ms: float
    total_ms: float
    timings_ms: dict[str, float]

    @property
    def token_ms(self) -> float:
        """Mean time from one token to the next."""
        return (self.total_ms - self.first_ms) / max(self.tokens - 1, 1)

    @property
    def said(self) -> tuple[str, tuple[float, ...], int]:
        """What must be the same whenever the same question is asked."""
        return self.text, self.logprobs, self.tokens


@dataclass(frozen=True)
class Server:
    """A server that runs in a process of its own."""

    name: str
    process: subprocess.Popen[str]
    port: int

    def ask(self, body: bytes) -> Reply:
        """One question, streamed. Raises Lost."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        since = time.perf_counter()
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise Lost(f"{self.name} answered {response.status}: {response.read(500)!r}")
            return _read(_events(response, since))
        except (OSError, http.client.HTTPException) as odd:
            raise Lost(f"{self.name}: {odd!r}") from odd
        finally:
            connection.close()

    def rss_mb(self) -> float:
        """Memory that the process holds now."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    def cpu_s(self) -> float:
        """Processor seconds that the process has used."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(text[11]) + int(text[12])) / os.sysconf("SC_CLK_TCK")


def _events(response: http.client.HTTPResponse, since: float) -> Iterator[tuple[float, Any]]:
    """Milliseconds since the request, and the data of each event."""
    for line in response:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield 1000 * (time.perf_counter() - since), json.loads(line[len(b"data: ") :])


def _read(events: Iterator[tuple[float, Any]]) -> Reply:
    """Our first event comes with the first token, whether that has a text or not. llama.cpp's comes
    with the first text, which random weights do not speak: its `timings` say how long ago the first
    token was when the last one came.
    """
    first_ms = total_ms = 0.0
    text, logprobs = list[str](), list[float]()
    usage, timings, since_first = dict[str, Any](), dict[str, float](), None
    for at_ms, data in events:
        if "error" in data:
            raise Lost(str(data["error"]))
        first_ms = first_ms or at_ms
        usage = data.get("usage") or usage
        timings |= data.get("edgevlm", {}).get("timings_ms", {})
        since_first = data.get("timings", {}).get("predicted_ms", since_first)
        for choice in data["choices"]:
            text.append(choice["delta"].get("content") or "")
            content = (choice.get("logprobs") or {}).get("content") or ()
            logprobs += [token["logprob"] for token in content]
            total_ms = at_ms
    if not usage:
        raise Lost("the stream ended early")
    if since_first is not None:
        first_ms = total_ms - since_first
    tokens = usage["completion_tokens"], usage["prompt_tokens"]
    return Reply("".join(text), tuple(logprobs), *tokens, first_ms, total_ms, timings)


def picture(seed: int, size: tuple[int, int] = (640, 480)) -> str:
    """A random image as a data URL."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def question(subject: str, url: str, tokens: int, *, logprobs: bool = False) -> bytes:
    """A request about an image, to be answered greedily as a stream."""
    text = {"type": "text", "text": f"Describe the {subject} in this image."}
    parts = [{"type": "image_url", "image_url": {"url": url}}, text]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body | ({"logprobs": True} if logprobs else {})).encode()


def questions(
    tokens: int,
    size: tuple[int, int] = (640, 480),
    *,
    pictures: int = 2,
    logprobs: bool = False,
) -> list[bytes]:
    """About so many images in turn."""
    urls = [picture(number, size) for number in range(pictures)]
    return [
        question(subject, urls[number % pictures], tokens, logprobs=logprobs)
        for number, subject in enumerate(SUBJECTS)
    ]


@dataclass
class Run:
    """A number of clients that asked all the time. elsewhere: the share of the processors that
    neither clients nor server used; peak_mb: the most memory that the server held.
    """

    clients: int
    asked: int
    answers: list[tuple[int, Reply]]
    lost: list[str]
    seconds: float
    cpu_s: float
    elsewhere: float
    peak_mb: float

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(reply.tokens for _, reply in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Of all clients together."""
        return self.tokens / self.seconds

    def differing(self, alone: Sequence[Reply]) -> int:
        """Answers that are not what the same questions got alone."""
        return sum(reply.said != alone[at].said for at, reply in self.answers)

    def firsts(self) -> list[float]:
        """Milliseconds to the first tokens."""
        return [reply.first_ms for _, reply in self.answers]

    def steps(self) -> list[float]:
        """Mean milliseconds between the tokens of each answer."""
        return [reply.token_ms for _, reply in self.answers]

    def queue_ms(self, percent: float) -> float:
        """A percentile of the time that requests waited for a slot, as the server says."""
        values = [reply.timings_ms.get("queue", 0.0) for _, reply in self.answers]
        return float(np.percentile(values, percent))

    def figures(self) -> dict[str, float]:
        """For the results."""
        return {
            "answers": len(self.answers),
            "tokens_per_s": round(self.tokens_per_s, 2),
            "time_to_first_token_p50_ms": round(float(np.median(self.firsts())), 1),
            "inter_token_latency_p50_ms": round(float(np.median(self.steps())), 2),
            "queue_p50_ms": round(self.queue_ms(50), 1),
            "queue_p99_ms": round(self.queue_ms(99), 1),
            "cpu_ms_a_token": round(1000 * self.cpu_s / max(self.tokens, 1), 2),
            "peak_mb": round(self.peak_mb),
            "seconds": round(self.seconds, 1),
            "elsewhere": round(self.elsewhere, 3),
        }


def load(server: Server, bodies: Sequence[bytes], clients: int, each: int) -> Run:
    """`clients` at once, each asking `each` questions one after the other."""
    answers, lost = list[tuple[int, Reply]](), list[str]()

    def client(number: int) -> None:
        for at in islice(cycle(range(len(bodies))), number, number + each):
            try:
                answers.append((at, server.ask(bodies[at])))
            except Lost as odd:
                lost.append(str(odd))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    since, before = Moment.now(), server.cpu_s()
    with _memory(server) as samples:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    seconds, cpu_s = time.perf_counter() - since.at_s, server.cpu_s() - before
    others = since.share_elsewhere() - cpu_s / ((os.cpu_count() or 1) * seconds)
    return Run(
        clients, clients * each, answers, lost, seconds, cpu_s, max(0.0, others), max(samples)
    )


@contextmanager
def _memory(server: Server) -> Iterator[list[float]]:
    """What the server holds, sampled until the block ends."""
    samples, ended = [server.rss_mb()], threading.Event()

    def look() -> None:
        while not ended.wait(SAMPLED_S):
            samples.append(server.rss_mb())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
        samples.append(server.rss_mb())
