"""How the command line ends in an error: one line, a hint, and the exit status."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from edgevlm.toolkit import errors
from edgevlm.toolkit.terminal import program

_INTERRUPTED = "interrupted; nothing half-written was left behind"
_AGAIN_S = 0.05  # the callback that lost an interrupt has ended by then


class Interrupts:
    """Ctrl-C and SIGTERM, from now on: a KeyboardInterrupt, and `came` remembers it.

    Libraries make other errors of an interrupt, such as a failed import, or lose it in a callback:
    then it comes once more, for what would go on without end, such as a server.
    """

    def __init__(self) -> None:
        self.came = False
        signal.signal(signal.SIGTERM, self._raise)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's "&" ignores it
            signal.signal(signal.SIGINT, self._raise)
        signal.signal(signal.SIGALRM, self._raise)
        sys.unraisablehook = self._lost

    def _raise(self, number: int, frame: object) -> None:
        self.came = True
        raise KeyboardInterrupt

    def _lost(self, what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(what)
        else:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)

    def end(self) -> None:
        """The command has ended: a further interrupt ends the process without a word."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)


def interrupted() -> int:
    """Say that the command was interrupted; its exit status."""
    return fail(_INTERRUPTED, "", 130)


def leave(code: int) -> None:
    """End this process at once, whatever its threads do.

    While an interpreter ends, threads that load an engine are waited for, and what they hold may
    abort the process ("terminate called without an active exception", exit code -6).
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def told(error: BaseException, *, debug: bool, came: Callable[[], bool]) -> int:
    """Say what ended a command; its exit status: 130 for an interrupt, 2 for the parser's errors,
    else 1.

    came: whether the process was interrupted, whatever became of it. Raises what `--debug` shows
    as a traceback.
    """
    if came() or errors.interrupted(error):
        return interrupted()
    if isinstance(error, MemoryError):
        return fail("out of memory", "lower --max-context, or use a smaller model", 1)
    if isinstance(error, BrokenPipeError):
        return 1
    if isinstance(error, errors.ToolkitError):
        if debug:
            raise error
        return fail(error.message, error.hint, 1)
    if isinstance(error, OSError):
        return fail(f"{error.filename or 'a file'}: {error.strerror or error}", "", 1)
    if isinstance(error, (SystemExit, GeneratorExit)):
        raise error
    return _unexpected(error, debug=debug)


def _unexpected(error: BaseException, *, debug: bool) -> int:
    """An error that is not ours: the parser's, or a defect. A panic of Rust is no Exception."""
    format_message = getattr(error, "format_message", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error, file=sys.stderr)
        return 2
    if format_message is not None:
        return fail(format_message(), _usage(error, format_message()), 2)
    if type(error).__name__ == "Abort":
        return interrupted()
    if debug:
        raise error
    kind = type(error).__name__
    reason = errors.shortened(f"{kind}: {error}")
    return fail(reason, "this is a defect of edgevlm; --debug shows where", 1)


def _usage(error: BaseException, message: str) -> str:
    """What to type instead of a command that the parser refused: its form, and where more is."""
    context = getattr(error, "ctx", None)
    if context is None or context.parent is None:
        meant = re.search(r"Did you mean '([\w-]+)'", message)
        return f"edgevlm {meant[1]} --help" if meant else "edgevlm --help lists the verbs"
    verb = f"edgevlm {context.info_name}"
    words = [_word(parameter) for parameter in context.command.params]
    form = " ".join([verb, *filter(None, words)])
    quotes = "put a text of several words in quotes: " if "unexpected extra" in message else ""
    return f"{quotes}{form}; {verb} --help has all options"


def _word(parameter: Any) -> str:
    """A parameter in the form of its command; "" for an option that may be left out."""
    name = str(parameter.name).upper()
    if parameter.param_type_name == "argument":
        return name if parameter.required else f"[{name}]"
    return f"{parameter.opts[0]} {name}" if parameter.required else ""


def fail(message: str, hint: str, code: int) -> int:
    """Print an error, each part on one line; returns the exit status `code`."""
    for kind, text in (("error:", message), ("hint:", program.as_typed(hint))):
        if text:
            print(kind, errors.printable(" ".join(text.splitlines())), file=sys.stderr)
    return code
