"""Helpers that several backends use."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def place(source: Path, target: Path) -> None:
    """Make `target` a file with the content of `source`, which may be a link.

    A copy, whose blocks btrfs and XFS share with the original. Not a hard link: onnx.load refuses
    weights that have another name, in the bundle as in the engine. A bundle that is made for the
    build alone, inside the engine's folder, is linked to; it vanishes at the end.
    """
    if target.parent in source.parents:
        with suppress(OSError):
            os.link(source, target)
            return
    try:
        _copy_in_kernel(source, target)
    except (AttributeError, OSError):  # no such call here, or not between these file systems
        shutil.copyfile(source, target)


def _copy_in_kernel(source: Path, target: Path) -> None:
    with source.open("rb") as original, target.open("wb") as copy:
        left = os.fstat(original.fileno()).st_size
        while left:
            count = os.copy_file_range(original.fileno(), copy.fileno(), left)
            if count == 0:
                raise OSError("nothing was copied")
            left -= count


def best_seconds(work: Callable[[], object], times: int = 5) -> float:
    """The shortest of several runs: what the machine can do, not what it usually does."""
    seconds = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
