"""Time per stage of one question."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A stage's stretch of time, in ms since the clock started."""

    stage: str
    start_ms: float
    ms: float


class Clock:
    """Starts with the reply; collects spans."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.spans: list[Span] = []

    def now_ms(self) -> float:
        """Milliseconds since the start."""
        return 1000 * (time.perf_counter() - self._started)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """The block is a span of `stage`."""
        begin = self.now_ms()
        yield
        self.spans.append(Span(stage, begin, self.now_ms() - begin))

    def totals_ms(self) -> dict[str, float]:
        """Milliseconds per stage, several spans added up."""
        found: dict[str, float] = {}
        for span in self.spans:
            found[span.stage] = found.get(span.stage, 0.0) + span.ms
        return found
