"""Helpers that several backends use."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path


def link(source: Path, target: Path) -> None:
    """Hard-link `target` to `source`, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def best_seconds(work: Callable[[], object], times: int = 5) -> float:
    """The shortest of several runs: what the machine can do, not what it usually does."""
    seconds = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
