"""Every error that edgevlm raises on purpose, as one tree.

ToolkitError                 message + hint (the next step)
├── ConfigError              a config file or option with an unknown or conflicting value
├── CheckpointError          weights on disk: missing, unexpected, mis-shaped, truncated
├── BundleError              a bundle or engine folder that does not match its manifest
├── InputError               an image, prompt or request that cannot be used
│   └── PromptTooLong        the prompt does not fit into the engine's context
├── UnsupportedError         this op, model or precision does not exist on that target
├── MissingExtra             an optional package is needed; the hint is the install command
├── DataError                a data set that cannot be read, or with too many broken samples
├── CalibrationError         the samples cannot give a precision plan
├── BuildError               a backend refused to compile a component
├── TargetMismatch           the engine was built for another machine; the hint rebuilds it
├── OutOfMemory              memory needed, memory free, and what lowers the need
├── OutputError              the artifact could not be written (exists, disk full, no permission)
└── AccuracyError            a built component differs from the reference by too much
"""

from __future__ import annotations

import difflib
import os
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_MOST_QUOTED = 200
_MOST = 600  # letters of a message; a list of a thousand tensors says no more than its ends
_TAIL = 120
_MOST_SEARCHED = 100_000
_STDERR = 2
_GUARD = threading.Lock()
_INSIDE: list[int | None] = []  # of `silenced`: where standard error led, then one None for each
# A quoted value that is too long: its first letters, and the last few.
_LONG_QUOTE = re.compile(
    r"""(?<![^\s=(\[{,:])(['"])((?:(?!\1)[^\\]|\\.){200})(?:(?!\1)[^\\]|\\.)+\1"""
)
# What a terminal acts upon instead of showing it: controls, changes of direction, line ends; and
# half characters, which cannot be written.
_UNPRINTED = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class ToolkitError(Exception):
    """An error with the offending value in `message` and the next step in `hint`.

    Values that a file or a user gave may be of any length: quoted ones are cut to 200 letters, and
    messages to 600.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        message = shortened(message)
        super().__init__(message)
        self.message = message
        self.hint = shortened(hint)


def shortened(message: str) -> str:
    """A message whose quoted values have 200 letters at most, and which has 600."""
    if len(message) > _MOST_SEARCHED:
        message = f"{message[:_MOST_SEARCHED]}…{message[-_TAIL:]}"
    if len(message) > _MOST_QUOTED:
        message = _LONG_QUOTE.sub(r"\1\2…\1", message)
    if len(message) > _MOST:
        message = f"{message[: _MOST - _TAIL]} … {message[-_TAIL:]}"
    return message


def printable(text: str, keep: str = "") -> str:
    """`text` with everything that a terminal would act upon as Python's escapes, except `keep`.

    What comes from a file, or from a model, may hold such characters; they must not move the cursor
    or hide what follows.
    """
    return _UNPRINTED.sub(lambda m: m[0] if m[0] in keep else repr(m[0])[1:-1], text)


class ConfigError(ToolkitError):
    """A configuration value is unknown, missing, of the wrong type or not implemented."""


class CheckpointError(ToolkitError):
    """A checkpoint's tensors are missing, unexpected, mis-shaped or unreadable."""


class BundleError(ToolkitError):
    """A bundle or engine folder is damaged or of another format."""


class InputError(ToolkitError):
    """An image, a prompt or a request file cannot be used."""


class PromptTooLong(InputError):
    """A prompt has more tokens than the engine's context; a chat drops its oldest turns then."""


class UnsupportedError(ToolkitError):
    """The combination of model, op, precision and target is not implemented."""


class MissingExtra(ToolkitError):
    """A package that this verb needs is not installed; broken: why it cannot be loaded."""

    def __init__(self, package: str, extra: str, *, purpose: str, broken: str = "") -> None:
        state = f"is installed and cannot be loaded: {broken}" if broken else "is not installed"
        super().__init__(
            f"{purpose} needs the package {package!r}, which {state}",
            hint=f"pip install {'--force-reinstall ' if broken else ''}'edgevlm[{extra}]'",
        )


class DataError(ToolkitError):
    """A data set for training cannot be read, or too many of its samples are broken."""


class CalibrationError(ToolkitError):
    """The calibration samples or ranges cannot give a precision plan."""


class BuildError(ToolkitError):
    """A backend could not compile or load a component."""


class TargetMismatch(ToolkitError):
    """An engine is opened on a machine, backend or version other than it was built for."""


class OutOfMemory(ToolkitError):
    """The work needs more memory than is free."""


class OutputError(ToolkitError):
    """An artifact could not be written."""


class AccuracyError(ToolkitError):
    """The output of a built component differs from the reference by more than is allowed."""


def nearest(name: str, known: Iterable[str], most: int = 4) -> list[str]:
    """Known names that hold `name`, else those spelled almost like it; [] if there are none."""
    names, sought = list(known), name.lower()
    held = [one for one in names if len(sought) > 2 and sought in one]
    return held[:most] or difflib.get_close_matches(sought, names, most)


# -- what other packages raise and print ---------------------------------------------------------


@contextmanager
def needing(package: str, extra: str, *, purpose: str) -> Iterator[None]:
    """Import an optional package inside. Raises MissingExtra, and KeyboardInterrupt where a package
    made an ImportError of one.
    """
    try:
        yield
    except ImportError as failed:
        if interrupted(failed):
            raise KeyboardInterrupt from None
        broken = "" if isinstance(failed, ModuleNotFoundError) else str(failed)
        raise MissingExtra(package, extra, purpose=purpose, broken=broken) from None


def interrupted(error: BaseException) -> bool:
    """Whether an error was made of an interrupt: compiled modules tell theirs as an ImportError."""
    seen: set[int] = set()
    links = [error]
    while links:
        link = links.pop()
        if isinstance(link, KeyboardInterrupt):
            return True
        if id(link) not in seen:
            seen.add(id(link))
            links += [cause for cause in (link.__cause__, link.__context__) if cause is not None]
    return False


@contextmanager
def silenced() -> Iterator[None]:
    """What compiled libraries print on standard error inside is lost, as long as any thread is
    inside: the text of a Rust panic, complaints of libtiff. The error that they raise says what a
    user can use.
    """
    with _GUARD:
        _INSIDE.append(_lead_away() if not _INSIDE else None)
    try:
        yield
    finally:
        with _GUARD:
            kept = _INSIDE.pop()
            if kept is not None:  # the last one to leave
                os.dup2(kept, _STDERR)
                os.close(kept)


def _lead_away() -> int | None:
    """Let standard error lead nowhere; where it led is kept, None if it is closed."""
    try:
        kept, nowhere = os.dup(_STDERR), os.open(os.devnull, os.O_WRONLY)
    except OSError:
        return None
    os.dup2(nowhere, _STDERR)
    os.close(nowhere)
    return kept
