"""What several backends need."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path


def link(source: Path, target: Path) -> None:
    """The same bytes under a second name where the file system can, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def best_seconds(work: Callable[[], object], times: int = 5) -> float:
    """The shortest of several runs: what the machine can do, not what it usually does."""
    found = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return min(found[1:])
