"""Time per stage of one question."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """The interval of a stage, in ms since the clock started."""

    stage: str
    start_ms: float
    ms: float


class Clock:
    """Collects the spans of one reply, from its start."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.spans: list[Span] = []

    def now_ms(self) -> float:
        """Milliseconds since the start."""
        return 1000 * (time.perf_counter() - self._started)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Record the block as a span of `stage`."""
        begin = self.now_ms()
        yield
        self.spans.append(Span(stage, begin, self.now_ms() - begin))

    def totals_ms(self) -> dict[str, float]:
        """Milliseconds per stage, several spans added up."""
        totals: dict[str, float] = {}
        for span in self.spans:
            totals[span.stage] = totals.get(span.stage, 0.0) + span.ms
        return totals
