"""Unfinished folders: how they are called, who holds them, and what killed writers left.

While a folder is written, its writer holds a lock on a file beside it; the system lets go of the
lock when the process ends, however it ends. So an unfinished folder whose lock can be taken is a
leftover, wherever its writer ran: containers that share a disk do not see one another's processes.
What has no such file of ours beside it belongs to somebody else, whatever it is called.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgevlm.toolkit.checkpoints.inside import is_plain

# Files that say what the others of a folder are; without one it is nothing.
DESCRIPTIONS = ("manifest.json", "engine.json", "checkpoint.json", "config.json")
_LOCK, _OLD = ".lock", "-old"  # after the name of an unfinished folder
_MARK = "an unfinished artifact of edgevlm; its writer holds a lock on this file\n"
_ENTRY = re.compile(r"[0-9a-f]{16}(\.lock)?")  # of what we make, after the prefix
_DAY_S = 86_400


@dataclass(frozen=True)
class Unfinished:
    """A folder that is being written to become `final`: beside it, or in it.

    In it where `final` itself cannot be replaced, such as a mounted disk: files move one by one
    then, and the lock's file says which, so that another process can put them back.
    """

    folder: Path
    final: Path

    @property
    def lock(self) -> Path:
        """The file whose lock the writer holds."""
        return self.folder.with_name(self.folder.name + _LOCK)

    @property
    def old(self) -> Path:
        """Where what is replaced waits until the new one is in its place."""
        return self.folder.with_name(self.folder.name + _OLD)

    @property
    def inside(self) -> bool:
        """Whether it is in the folder that it becomes."""
        return self.folder.parent == self.final

    def note_moves(self, names: list[str]) -> None:
        """Write down which files are about to move to `final`, in their order."""
        with self.lock.open("ab", buffering=0) as file:  # one call: it is there, or it is not
            file.write(json.dumps(names).encode())

    def moves(self) -> list[str]:
        """What `note_moves` wrote; [] before."""
        text = self.lock.read_bytes().removeprefix(_MARK.encode())
        try:
            names = json.loads(text)
        except (ValueError, RecursionError):
            return []
        known = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return names if known and all(map(is_plain, names)) else []

    def clear(self) -> None:
        """Remove what is left, after giving back what was replaced if the new one is not there."""
        if self.inside:
            self._undo_moves()
        elif self.old.exists() and not self.final.exists():
            self.old.rename(self.final)
        for leftover in (self.folder, self.old):
            shutil.rmtree(leftover, ignore_errors=True)

    def _undo_moves(self) -> None:
        """Put back what moved, unless all did: then the last one is no longer in the folder."""
        names = self.moves()
        if not names or not (self.folder / names[-1]).exists():
            return
        for name in names:
            if not (self.folder / name).exists():
                (self.final / name).replace(self.folder / name)
        replaced = list(self.old.iterdir()) if self.old.exists() else []
        for path in sorted(replaced, key=lambda path: path.name in DESCRIPTIONS):
            path.replace(self.final / path.name)


@contextmanager
def held(final: Path, *, inside: bool) -> Iterator[Unfinished]:
    """An unfinished folder of this writer's own, whose lock is held until the block ends.

    The folder itself is not made yet.
    """
    while True:
        home, prefix = _place(final, inside=inside)
        mine = Unfinished(home / (prefix + secrets.token_hex(8)), final)
        descriptor = os.open(mine.lock, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        # Before it is locked, another process may take the new file for a leftover.
        if try_lock(descriptor) is not False and mine.lock.exists():
            break
        os.close(descriptor)
    try:
        os.write(descriptor, _MARK.encode())
        yield mine
    finally:
        mine.clear()
        mine.lock.unlink(missing_ok=True)
        os.close(descriptor)


def recover(final: Path) -> None:
    """Remove what killed writers of `final` left, and put back what one of them had moved away."""
    for inside in (False, True):
        for left in _leftovers(final, inside=inside):
            with suppress(FileNotFoundError), _taken(left) as stale:
                if stale:
                    left.clear()
                    left.lock.unlink(missing_ok=True)


def is_entry(name: str) -> bool:
    """Whether an entry of a folder that is its own place of writing belongs to a writer."""
    return (
        name.startswith(".partial-") and _ENTRY.fullmatch(name[9:].removesuffix(_OLD)) is not None
    )


def _place(final: Path, *, inside: bool) -> tuple[Path, str]:
    return (final, ".partial-") if inside else (final.parent, f".{final.name}.partial-")


def _leftovers(final: Path, *, inside: bool) -> list[Unfinished]:
    """What has a lock's file of ours."""
    home, prefix = _place(final, inside=inside)
    found = home.glob(f"{glob.escape(prefix)}*{_LOCK}")
    names = [path.name for path in found if _ENTRY.fullmatch(path.name.removeprefix(prefix))]
    every = [Unfinished(home / name.removesuffix(_LOCK), final) for name in sorted(names)]
    return [one for one in every if _is_ours(one)]


def _is_ours(left: Unfinished) -> bool:
    """Whether the lock's file says so. A writer killed before it said so has made no folder."""
    if not stat.S_ISREG(left.lock.lstat().st_mode):
        return False
    with left.lock.open("rb") as file:
        begun = file.read(len(_MARK))
    return begun == _MARK.encode() or (not begun and not left.folder.exists())


@contextmanager
def _taken(left: Unfinished) -> Iterator[bool]:
    """Whether the writer of this folder is gone; while the block runs nobody else is told so.

    On a file system without locks the age decides: no writer takes a day.
    """
    descriptor = os.open(left.lock, os.O_RDWR)
    try:
        locked = try_lock(descriptor)
        yield _is_old(left) if locked is None else locked and left.lock.exists()
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Whether the lock was free and is ours now; None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have none
        return None
    return True


def _is_old(left: Unfinished) -> bool:
    """Whether what belongs to a lock was last changed more than a day ago."""
    every = [path for path in (left.lock, left.folder, left.old) if path.exists()]
    changed = [path.stat().st_mtime for path in every]
    return time.time() - max(changed, default=0.0) > _DAY_S
