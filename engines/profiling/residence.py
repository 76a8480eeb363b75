"""Memory over time: what this process holds, asked every few milliseconds while it works."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

_EVERY_S = 0.02
_MOST = 2000  # samples; beyond, every second one is dropped and the interval doubles


class MemoryRecorder:
    """A context manager that records resident memory in a thread; nothing where /proc is not.

    `samples`: (milliseconds since it was made, megabytes of 2^20 bytes); `marks`: moments by name.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        self.marks: list[tuple[float, str]] = []
        self._began, self._every = time.perf_counter(), _EVERY_S
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)

    def __enter__(self) -> MemoryRecorder:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def mark(self, name: str) -> None:
        """Something begins now."""
        self.marks.append((round(self._now_ms(), 3), name))

    def _now_ms(self) -> float:
        return 1000 * (time.perf_counter() - self._began)

    def _record(self) -> None:
        while (held := resident_mb()) is not None:
            self.samples.append((round(self._now_ms(), 1), round(held, 2)))
            if len(self.samples) >= _MOST:
                self.samples = self.samples[::2]
                self._every *= 2
            if self._ended.wait(self._every):
                return


def resident_mb() -> float | None:
    """Memory of this process that is in RAM now; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
