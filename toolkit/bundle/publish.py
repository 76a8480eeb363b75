"""Putting a finished folder under its name, in one step wherever the system has one for it.

Where a folder is replaced, Linux exchanges the two names at once: whoever looks, or kills the
writer, finds the old folder or the new one. Elsewhere the old one is moved away first; and files
move one by one into a folder that cannot be replaced, such as a mounted disk. What is interrupted
in between is put back by the next writer (unfinished.py).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from pathlib import Path

from edgevlm.toolkit.bundle.unfinished import DESCRIPTIONS, Unfinished, is_entry

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD
_NUMBERS = {"x86_64": 316, "aarch64": 276}  # of the call, for a C library without it
_NOT_HERE = {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.EXDEV}
_MOUNTS = Path("/proc/self/mountinfo")
CALIBRATING = ".calibrating"  # in a folder that is kept, what calibration has found for it so far
_OF_DISKS = {"lost+found", CALIBRATING}


def publish(made: Unfinished) -> None:
    """Give a finished folder its name; what was there is then in its place, or at `made.old`."""
    if made.inside:
        move_files(made, entries(made.final))
    elif not made.final.exists() or not any(made.final.iterdir()):
        made.folder.rename(made.final)
    elif not exchanged(made.folder, made.final):
        _replace(made)


def exchanged(one: Path, other: Path) -> bool:
    """Whether two names were exchanged, in one step; False where the system cannot do that.

    Raises OSError for what the system refuses otherwise.
    """
    if platform.system() != "Linux":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    names = _HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE
    if hasattr(library, "renameat2"):
        failed = library.renameat2(*names)
    elif platform.machine() in _NUMBERS:
        failed = library.syscall(_NUMBERS[platform.machine()], *names)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in _NOT_HERE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _replace(made: Unfinished) -> None:
    made.final.rename(made.old)
    try:
        made.folder.rename(made.final)
    except BaseException:
        made.old.rename(made.final)
        raise


def move_files(made: Unfinished, replaced: list[str]) -> None:
    """Move what is replaced away and the new files in: the description first, and last.

    Without its description a folder is nothing, so nobody reads it half.
    """
    new, old = (
        sorted(names, key=lambda name: (name in DESCRIPTIONS, name))
        for names in ([path.name for path in made.folder.iterdir()], replaced)
    )
    made.old.mkdir()
    made.note_moves(new)
    for name in reversed(old):
        (made.final / name).rename(made.old / name)
    for name in new:
        (made.folder / name).rename(made.final / name)


def entries(folder: Path) -> list[str]:
    """What is in a folder; in one that is kept, without what the disk or a writer has there."""
    names = [path.name for path in folder.iterdir()]
    if not names or not must_be_kept(folder):
        return names
    return [name for name in names if name not in _OF_DISKS and not is_entry(name)]


def must_be_kept(folder: Path) -> bool:
    """Whether a folder cannot be replaced by another one: a mounted disk, or one in a folder that
    may not be changed.
    """
    if not folder.is_dir():
        return False
    folder = folder.resolve()
    return folder.is_mount() or _is_bound(folder) or not os.access(folder.parent, os.W_OK)


def _is_bound(folder: Path) -> bool:
    """Whether Linux lists a folder as a mount: those of the same disk look like any other."""
    try:
        lines = os.fsdecode(_MOUNTS.read_bytes()).splitlines()
    except OSError:
        return False
    name = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in str(folder))
    return any(line.split(" ")[4:5] == [name] for line in lines)
