"""How the command line ends in an error: one line, a hint, and the exit status."""

from __future__ import annotations

import sys


def unexpected(error: Exception, interrupted: str, *, debug: bool) -> int:
    """The exit status of an error that is not ours: 2 for the parser's, else 1 and a defect.

    Raises the error itself with `debug`.
    """
    format_message = getattr(error, "format_message", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error, file=sys.stderr)
        return 2
    if format_message is not None:
        return fail(format_message(), "edgevlm --help, or edgevlm VERB --help", 2)
    if type(error).__name__ == "Abort":
        return fail(interrupted, "", 130)
    if debug:
        raise error
    kind = type(error).__name__
    return fail(f"{kind}: {error}", "this is a defect of edgevlm; --debug shows where", 1)


def fail(message: str, hint: str, code: int) -> int:
    """Print an error, each part on one line; returns the exit status `code`."""
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    if hint:
        print("hint:", " ".join(hint.splitlines()), file=sys.stderr)
    return code
