"""Standard output and error that can always be written, whatever the shell handed over."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


def prepare() -> None:
    """Make both streams writable.

    A stream that the shell closed (`>&-`) is None in Python; its number would go to the next file
    that is opened, so the null device takes it. A terminal that lacks a character of a name or of
    an answer gets its escape. What nobody reads on standard error is lost, and stops no work.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = _Unheard(sys.stderr)


class _Unheard(io.TextIOBase):
    """A stream whose reader may leave, or whose disk may fill up, without an error."""

    def __init__(self, inner: TextIO) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._inner.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._inner.flush()

    def isatty(self) -> bool:
        return self._inner.isatty()

    def fileno(self) -> int:
        return self._inner.fileno()


@contextmanager
def written() -> Iterator[None]:
    """Write on standard output inside; an OSError then says that it is the one. A BrokenPipeError
    is left as it is: nobody is there to be told.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as refused:
        raise OSError(refused.errno, refused.strerror, "standard output") from None


def write_ascii(text: str) -> None:
    """One line on standard output as ASCII bytes, whatever encoding the terminal asks for."""
    buffer = getattr(sys.stdout, "buffer", None)
    if buffer is None:  # a stream in memory
        print(text)
        return
    sys.stdout.flush()
    buffer.write(text.encode("ascii") + b"\n")
    buffer.flush()


def flush() -> str | None:
    """Write what standard output still holds. Returns why that cannot be, "" if its reader has
    gone, and None if all is written.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        return ""
    except OSError as refused:
        _discard(sys.stdout)
        return f"standard output: {refused.strerror}"
    return None


def _discard(stream: TextIO) -> None:
    """Send the rest nowhere: the interpreter's own flush at exit must not fail too."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
