"""How much memory a part of a calibration takes."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable


def peak(run: Callable[[], object]) -> int:
    """The most bytes that it held at a time, whatever the process held before.

    Garbage is collected first: how soon that happens while it runs does not depend on what ran
    before.
    """
    gc.collect()
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
