"""Ending a process that trains beside others."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from torch import distributed


def leave(code: int) -> None:
    """End this process at once if it is one of several that train together, else do nothing.

    While an interpreter ends, gloo's threads may outlive what they use, and abort a process whose
    work is done ("terminate called without an active exception", exit code -6).
    """
    if distributed.is_available() and distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
