"""Standard output and error that can always be written, whatever the shell handed over."""

from __future__ import annotations

import io
import os
import sys


def prepare() -> None:
    """Make both streams writable.

    A stream that the shell closed (`>&-`) is None in Python; its number would go to the next file
    that is opened, so the null device takes it. A terminal that lacks a character of a name or of
    an answer gets its escape.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def flush() -> bool:
    """Write what standard output still holds; False if its reader has gone."""
    try:
        sys.stdout.flush()
        return True
    except BrokenPipeError:
        # The interpreter's own flush at exit must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
