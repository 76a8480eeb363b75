"""What to type instead of the name of an image that is not there."""

from __future__ import annotations

import difflib
from itertools import islice
from pathlib import Path

_MOST = 10_000  # files of a folder that are looked at


def of_address(name: str) -> str:
    """The hint for an address in place of a file; "" for any other name."""
    address = name.startswith("data:") or "://" in name
    return "addresses are not read: download the image, and give its file" if address else ""


def instead(name: str) -> str:
    """The hint for a file that does not exist: the one of its folder that is called almost so."""
    if hint := of_address(name):
        return hint
    path = Path(name)
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    try:
        names = sorted(entry.name for entry in islice(path.parent.iterdir(), _MOST))
    except OSError:
        return ""
    other_case = [found for found in names if found.lower() == path.name.lower()]
    close = other_case or difflib.get_close_matches(path.name, names, 1)
    if close:
        return f"there is {path.parent / close[0]}"
    here = path.parent.absolute()
    return f"in {here} there is no file of a name like that"
