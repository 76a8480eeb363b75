"""Folders that are whole or absent: written beside their name, then renamed into place."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgevlm.toolkit.errors import ConfigError, OutputError
from edgevlm.toolkit.strict import read_json

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MARKERS = ("manifest.json", "engine.json")


@contextmanager
def writing(out: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes otherwise.

    Raises OutputError if `out` exists (unless `force`, and only for our own artifacts), the disk
    is full, or the place cannot be written. Interrupting the block removes the temporary folder.
    """
    refuse_existing(out, force=force)
    place = out.resolve()  # a link keeps pointing at what is written
    partial = place.parent / f".{place.name}.partial-{os.getpid()}"
    parents = [parent for parent in place.parents if not parent.exists()]
    try:
        _clear_leftovers(place)
        partial.mkdir(parents=True)
        yield partial
        refuse_existing(out, force=force)  # another process may have been faster
        _publish(partial, place)
    except OSError as refused:
        raise _output_error(refused, out) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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
    if not out.is_dir() or (found := _artifact_files(out)) is None:
        raise OutputError(
            f"{out} exists and is not an artifact of ours; it is left alone",
            hint="write to another place, or remove it yourself",
        )
    foreign = sorted({path.name for path in out.iterdir()} - found)
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
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OutputError(
            f"{out} needs {nbytes / 1e9:.2f} GB, {place} has {free / 1e9:.2f} GB free",
            hint="free some space, or write to another disk",
        )


def _clear_leftovers(place: Path) -> None:
    """Remove partial folders of processes that were killed before they could clean up."""
    for stale in place.parent.glob(f".{glob.escape(place.name)}.partial-*"):
        pid = stale.name.removesuffix("-old").rpartition("-")[2]
        if Path(f"/proc/{pid}").exists() or not Path("/proc/self").exists():
            continue
        if stale.name.endswith("-old") and not place.exists():
            stale.rename(place)  # killed between the two renames of _publish
        else:
            shutil.rmtree(stale, ignore_errors=True)


def _publish(partial: Path, place: Path) -> None:
    if not place.exists() or not any(place.iterdir()):
        partial.rename(place)
        return
    old = place.parent / f"{partial.name}-old"
    place.rename(old)
    try:
        partial.rename(place)
    except BaseException:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_empty(parents: list[Path]) -> None:
    """Remove folders that were made for an artifact which did not come; the innermost first."""
    with suppress(OSError):  # one that holds something stays, and so do those around it
        for parent in parents:
            parent.rmdir()


def _output_error(refused: OSError, out: Path) -> OutputError:
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
