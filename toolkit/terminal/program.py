"""How this program is typed in the shell that started it, so that what it prints can be copied."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

NAME = "edgevlm"
_VERBS = (
    "export calibrate build verify run chat serve deploy embed batch profile eval plan train demo "
    "inspect doctor selftest"
)
_COMMAND = re.compile(rf"(?<![\w./'\"-]){NAME}(?= ({'|'.join(_VERBS.split())}|VERB|--help)\b)")


def as_typed(text: str) -> str:
    """`text` with every command of edgevlm as it is typed here."""
    name = shlex.quote(typed())
    return text if name == NAME else _COMMAND.sub(lambda _: name, text)


def typed() -> str:
    """The name edgevlm, or a path where the shell would find another one or none: in an environment
    that is not activated.
    """
    script = Path(sys.argv[0])
    return shortest(script) if script.name == NAME and script.is_file() else NAME


def shortest(path: Path) -> str:
    """A program as this shell finds it: by its name alone, or else by its path."""
    found = shutil.which(path.name)
    if found is not None and Path(found).absolute() == path.absolute():
        return path.name
    near = os.path.relpath(path)
    if near.startswith(".."):
        return str(path)
    return near if os.sep in near else os.path.join(".", near)
