"""Files that a description names: they are regular files, and in the folder of the description.

A folder may come from a stranger. A name in it, or a link, must not lead to the reader's own files,
nor to a device or a pipe, whose end never comes.
"""

from __future__ import annotations

import stat
from pathlib import Path

_LONGEST = 255  # bytes of a name, on the usual file systems


def is_plain(name: str) -> bool:
    """Whether a name is that of an entry of a folder, and no path."""
    try:
        fits = 0 < len(name.encode()) <= _LONGEST
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return fits and name not in (".", "..") and not any(c in name for c in "/\\\0")


def fault(folder: Path, name: str) -> str | None:
    """What is wrong with the entry `name` of a folder, as text; None if it is a file in there.

    The cache of the Hugging Face hub keeps files as links from REPO/snapshots/REVISION to
    REPO/blobs: those are in the folder too, wherever the cache is.
    """
    if not is_plain(name):
        return f"names {name!r:.200}, which is no file of its folder"
    path = folder / name
    try:
        kind = path.stat().st_mode
        real = path.resolve(strict=True)
    except FileNotFoundError:
        return f"lacks {name}"
    except (OSError, RuntimeError) as refused:  # RuntimeError: links in a circle, before 3.13
        return f"names {name}, which cannot be read: {getattr(refused, 'strerror', refused)}"
    if not stat.S_ISREG(kind):
        return f"names {name}, which is no regular file"
    if not _within(real, folder.resolve()):
        return f"has {name} as a link that leaves the folder"
    return None


def _within(real: Path, home: Path) -> bool:
    blobs = real.parent
    of_hub = blobs.name == "blobs" and (blobs.parent / "snapshots").is_dir()
    return of_hub or real.is_relative_to(home)


def require_regular(path: Path) -> None:
    """Raise OSError for a pipe, a device or a folder in the place of a file."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(None, "it is no regular file", str(path))
