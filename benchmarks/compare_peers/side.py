"""What the programs' scripts share: the question, two clocks, the JSON line that a child prints.

A program is opened once. Every answer is timed to its first token and to its last one, then the
encoder with the merger alone. The wall's clock counts with several threads, the process's own
with one: it does not see what other processes do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import Moment, wait_until_quiet

PIXELS, IMAGE_TOKENS, TEXT_TOKENS, ANSWER = 336, 576, 32, 64
POSITIONS = IMAGE_TOKENS + TEXT_TOKENS
PRINTED = 64  # features of this many positions and channels name the work that was done


@dataclass(frozen=True)
class Opened:
    """A program that is ready.

    answer(number, tokens, first) answers about image `number` and calls `first` at its first
    token. encoder() gives what runs the encoder and merger on image `number`; it may load more.
    features() are those of image 0, [IMAGE_TOKENS, width].
    """

    answer: Callable[[int, int, Callable[[], None]], None]
    versions: dict[str, str]
    positions: Callable[[], int]
    encoder: Callable[[], Callable[[int], None]] | None = None
    features: Callable[[], Any] | None = None


@dataclass
class Lap:
    """Seconds on both clocks since the last call of `take`, and the share that others used."""

    since: Moment = field(default_factory=Moment.now)
    cpu: float = field(default_factory=time.process_time)

    def take(self) -> dict[str, float]:
        """The lap that ends now; the next one begins."""
        wall, cpu = time.perf_counter() - self.since.at_s, time.process_time() - self.cpu
        lap = {"wall_s": wall, "cpu_s": cpu, "elsewhere": self.since.share_elsewhere()}
        self.since, self.cpu = Moment.now(), time.process_time()
        return lap


@dataclass
class Line:
    """What a child prints: laps by name, and figures of the whole process."""

    load_s: float
    load_cpu_s: float
    versions: dict[str, str]
    positions: int = 0
    peak_rss_mb: float = 0.0
    laps: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    features: list[float] = field(default_factory=list)

    def add(self, name: str, lap: dict[str, float], calls: int = 1) -> None:
        """One more lap; `calls` says what it is divided by."""
        divided = {key: lap[key] / calls for key in ("wall_s", "cpu_s")}
        self.laps.setdefault(name, []).append(lap | divided)

    def print(self) -> None:
        """One line of JSON."""
        print(json.dumps(asdict(self)), flush=True)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of every script: files and settings of the program, then how to measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--patience", type=float, default=20.0)
    options = parser.parse_args(words)
    options.settings = dict(word.split("=", 1) for word in options.set)
    return options


def measure(opening: Callable[[argparse.Namespace], Opened]) -> None:
    """The `main` of a script: open, one short answer to warm up, answers, then the encoder."""
    options = arguments()
    lap = Lap()
    opened = opening(options)
    load = lap.take()
    line = Line(load["wall_s"], load["cpu_s"], opened.versions)
    opened.answer(0, 4, lambda: None)
    for number in range(1, options.runs + 1):
        wait_until_quiet(options.patience)
        answer(opened, number, line)
    line.positions, line.peak_rss_mb = opened.positions(), peak_rss_mb()
    if opened.encoder is not None:
        encode = opened.encoder()
        encode(0)
        for number in range(1, options.runs + 1):
            wait_until_quiet(options.patience)
            lap = Lap()
            encode(number)
            line.add("encoder", lap.take())
    if opened.features is not None:
        line.features = fingerprint(opened.features())
    line.print()


def answer(opened: Opened, number: int, line: Line) -> None:
    """One answer about an image that was not asked about before: prompts may be remembered."""
    laps: list[dict[str, float]] = []
    lap = Lap()
    opened.answer(number, ANSWER, lambda: laps.append(lap.take()))
    laps.append(lap.take())
    first, rest = laps
    line.add("first_token", first)
    line.add("token", rest, ANSWER - 1)


def image(number: int) -> Any:
    """Image `number`: noise, [PIXELS, PIXELS, 3] in 8 bits."""
    import numpy as np

    shape = (PIXELS, PIXELS, 3)
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def pixel_values(number: int) -> Any:
    """Image `number` as a CLIP takes it, [1, 3, PIXELS, PIXELS] in float32."""
    import numpy as np

    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    deviation = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
    scaled = (image(number).astype(np.float32) / 255 - mean) / deviation
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


def fingerprint(features: Any) -> list[float]:
    """Some values of the features [.., IMAGE_TOKENS, width], to compare programs by."""
    rows = features.reshape(IMAGE_TOKENS, -1)
    step, width = IMAGE_TOKENS // PRINTED, rows.shape[1] // PRINTED
    return [round(float(rows[i * step, i * width]), 6) for i in range(PRINTED)]


def peak_rss_mb() -> float:
    """The most memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(row.split(":", 1) for row in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1024)
