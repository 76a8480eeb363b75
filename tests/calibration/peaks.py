"""How much memory a part of a calibration takes."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable


def peak(run: Callable[[], object]) -> int:
    """The most bytes that it held at a time, whatever the process held before.

    Python looks for garbage in circles the more rarely the more objects there are: those that are
    there before are set aside, so that what `run` leaves is found as soon as in a new process.
    """
    gc.collect()
    gc.freeze()
    gc.collect()
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.unfreeze()
