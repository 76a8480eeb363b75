"""Folders that are whole or absent: written beside their name, then renamed into place.

While a folder is written, its writer holds a lock on a file beside it; the system lets go of the
lock when the process ends, however it ends. So a partial folder whose lock can be taken is a
leftover, wherever its writer ran: containers that share a disk do not see one another's processes.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgevlm.toolkit.errors import ConfigError, OutputError
from edgevlm.toolkit.strict import read_json

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LOCK, _OLD = ".lock", "-old"  # after the name of a partial folder
_DAY_S = 86_400
_MARKERS = ("manifest.json", "engine.json", "checkpoint.json")


@contextmanager
def writing(out: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes otherwise.

    Raises OutputError if `out` exists (unless `force`, and only for our own artifacts), the disk
    is full, or `out` cannot be written. Interrupting the block removes the temporary folder.
    """
    recover(out)
    refuse_existing(out, force=force)
    final = out.resolve()  # a link keeps pointing at what is written
    parents = [parent for parent in final.parents if not parent.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final) as partial:
            partial.mkdir()
            yield partial
            refuse_existing(out, force=force)  # another process may have been faster
            _publish(partial, final)
    except OSError as refused:
        raise output_error(refused, out) from None
    finally:
        _remove_empty(parents)


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise OutputError where writing to `out` would destroy something, or cannot be done."""
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError:  # the packages that read graphs cannot open it
        raise OutputError(
            f"{ascii(str(out))} is not a name in UTF-8", hint="choose another name"
        ) from None
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or (listed := _artifact_files(out)) is None:
        raise OutputError(
            f"{out} exists and is not an artifact of ours; it is left alone",
            hint="write to another place, or remove it yourself",
        )
    foreign = sorted({path.name for path in out.iterdir()} - listed)
    if foreign:
        raise OutputError(
            f"{out} holds what we did not write, and is left alone: {', '.join(foreign[:3])}",
            hint="move that away, or write to another place",
        )
    if not force:
        raise OutputError(f"{out} exists", hint="add --force to replace it")


def _artifact_files(folder: Path) -> set[str] | None:
    """Names of an artifact's files; None for a folder that is no artifact of ours.

    The name of the description alone says little: browsers' extensions have a manifest.json too.
    """
    for marker in _MARKERS:
        try:
            data = read_json(folder / marker)
        except ConfigError:
            continue
        if isinstance(data.get("files"), dict) and "made_by" in data:
            return {marker, *data["files"]}
    return None


def refuse_source(out: Path, source: Path) -> None:
    """Raise OutputError if replacing `out` would destroy `source`, from which it is made."""
    if source.exists() and source.resolve().is_relative_to(out.resolve()):
        raise OutputError(
            f"{out} is or holds {source}, which is read", hint="write to another place"
        )


def require_space(out: Path, nbytes: int) -> None:
    """Raise OutputError before the work starts if the disk cannot hold `nbytes` more."""
    disk = out.absolute()
    while not disk.exists():
        disk = disk.parent
    free = shutil.disk_usage(disk).free
    if free < nbytes:
        raise OutputError(
            f"{out} needs {nbytes / 1e9:.2f} GB, {disk} has {free / 1e9:.2f} GB free",
            hint="free some space, or write to another disk",
        )


def recover(out: Path) -> None:
    """Remove what killed writers of `out` left, and put back what one of them had moved away."""
    with suppress(OSError, ValueError):  # a bad path is reported when it is written to
        final = out.resolve()
        for partial in _partial_folders(final):
            lock = _lock_of(partial)
            with suppress(FileNotFoundError), _taken(lock) as stale:
                if stale:
                    _clear(partial, final)
                    lock.unlink(missing_ok=True)


def _partial_folders(final: Path) -> list[Path]:
    """Paths of partial folders that have left something: themselves, the old artifact, a lock."""
    leftovers = final.parent.glob(f"{glob.escape(_partial_prefix(final))}*")
    names = {path.name.removesuffix(_OLD).removesuffix(_LOCK) for path in leftovers}
    return [final.parent / name for name in sorted(names)]


def _partial_prefix(final: Path) -> str:
    return f".{final.name}.partial-"


def _lock_of(partial: Path) -> Path:
    return partial.with_name(partial.name + _LOCK)


def _old_of(partial: Path) -> Path:
    return partial.with_name(partial.name + _OLD)


def _clear(partial: Path, final: Path) -> None:
    old = _old_of(partial)
    if old.exists() and not final.exists():
        old.rename(final)  # killed between the two renames of _publish
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _locked(final: Path) -> Iterator[Path]:
    """A partial folder's path of this writer's own, whose lock is held until the block ends."""
    while True:
        partial = final.with_name(_partial_prefix(final) + secrets.token_hex(4))
        lock = _lock_of(partial)
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        # Before it is locked, another process may take the new file for a leftover.
        if try_lock(descriptor) is not False and lock.exists():
            break
        os.close(descriptor)
    try:
        yield partial
    finally:
        _clear(partial, final)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def _taken(lock: Path) -> Iterator[bool]:
    """Whether the writer of this lock is gone; while the block runs nobody else is told so.

    The file of the lock is there before a partial folder and after it: without it the writer is
    gone. On a file system without locks the age decides: no writer takes a day.
    """
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        yield True
        return
    try:
        locked = try_lock(descriptor)
        yield _is_old(lock) if locked is None else locked
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


def _is_old(lock: Path) -> bool:
    """Whether what belongs to a lock was last changed more than a day ago."""
    partial = lock.with_name(lock.name.removesuffix(_LOCK))
    changed = [path.stat().st_mtime for path in (lock, partial, _old_of(partial)) if path.exists()]
    return time.time() - max(changed, default=0.0) > _DAY_S


def _publish(partial: Path, final: Path) -> None:
    if not final.exists() or not any(final.iterdir()):
        partial.rename(final)
        return
    old = _old_of(partial)
    final.rename(old)
    try:
        partial.rename(final)
    except BaseException:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_empty(parents: list[Path]) -> None:
    """Remove folders that were made for an unfinished artifact; the innermost first."""
    with suppress(OSError):  # one that holds something stays, and so do those around it
        for parent in parents:
            parent.rmdir()


def output_error(refused: OSError, out: Path) -> OutputError:
    """What the system refused while `out` was written, in words."""
    if refused.errno in _FULL:
        return OutputError(
            f"{out} could not be written: the disk is full ({refused.strerror})",
            hint="free some space, or write to another disk; nothing was left behind",
        )
    return OutputError(
        f"{out} could not be written: {refused.strerror or refused}",
        hint="choose a place where you may write",
    )


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
