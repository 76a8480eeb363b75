"""Folders that are whole or absent: written beside their name, then renamed into place."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolkit.errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MARKERS = ("manifest.json", "engine.json")


@contextmanager
def writing(out: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes otherwise.

    Raises OutputError if `out` exists (unless `force`, and only for our own artifacts), the disk
    is full, or the place cannot be written. Interrupting the block removes the temporary folder.
    """
    refuse_existing(out, force=force)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        _clear_leftovers(out)
        partial.mkdir(parents=True)
        yield partial
        _publish(partial, out)
    except OSError as refused:
        raise _output_error(refused, out) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise OutputError where writing to `out` would destroy something."""
    if not out.exists():
        return
    ours = out.is_dir() and any((out / marker).exists() for marker in _MARKERS)
    if not ours and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} exists and is not an artifact of ours; it is left alone")
    if ours and not force:
        raise OutputError(f"{out} exists", hint="add --force to replace it")


def require_space(out: Path, nbytes: int) -> None:
    """Raise OutputError before the work starts if the disk cannot hold `nbytes` more."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OutputError(
            f"{out} needs {nbytes / 1e9:.2f} GB, {place} has {free / 1e9:.2f} GB free",
            hint="free some space, or write to another disk",
        )


def _clear_leftovers(out: Path) -> None:
    """Remove partial folders of processes that were killed before they could clean up."""
    for stale in out.parent.glob(f".{out.name}.partial-*"):
        pid = stale.name.rpartition("-")[2]
        if not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(stale, ignore_errors=True)


def _publish(partial: Path, out: Path) -> None:
    if out.exists():
        old = out.parent / f".{out.name}.partial-{os.getpid()}-old"
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(out)


def _output_error(refused: OSError, out: Path) -> OutputError:
    if refused.errno in _FULL:
        return OutputError(
            f"{out} could not be written: the disk is full ({refused.strerror})",
            hint="free some space, or write to another disk; nothing was left behind",
        )
    return OutputError(f"{out} could not be written: {refused.strerror or refused}")


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
