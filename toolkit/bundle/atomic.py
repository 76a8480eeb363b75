"""Folders that are whole or absent: written beside their name, then put in its place.

unfinished.py knows the folders that are being written, publish.py puts them in their place.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgevlm.toolkit.bundle import sealed, unfinished
from edgevlm.toolkit.bundle.publish import entries, must_be_kept, publish
from edgevlm.toolkit.errors import ConfigError, OutputError
from edgevlm.toolkit.strict import read_json

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(out: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes otherwise.

    Raises OutputError if `out` exists (unless `force`, and only for our own artifacts), the disk
    is full, or `out` cannot be written. Interrupting the block removes the temporary folder; at no
    moment is an artifact that is replaced gone, whatever kills the process.
    """
    recover(out)
    refuse_existing(out, force=force)
    final = out.resolve()  # a link keeps pointing at what is written
    parents = [parent for parent in final.parents if not parent.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.held(final, inside=must_be_kept(final)) as made:
            made.folder.mkdir()
            yield made.folder
            refuse_existing(out, force=force)  # another process may have been faster
            publish(made)
    except OSError as refused:
        raise output_error(refused, out) from None
    finally:
        _remove_empty(parents)


def recover(out: Path) -> None:
    """Remove what killed writers of `out` left, and put back what one of them had moved away."""
    with suppress(OSError, ValueError):  # a bad path is reported when it is written to
        unfinished.recover(out.resolve())


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise OutputError where writing to `out` would destroy something, or cannot be done."""
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError:  # the packages that read graphs cannot open it
        raise OutputError(
            f"{ascii(str(out))} is not a name in UTF-8", hint="choose another name"
        ) from None
    if not os.path.lexists(out) or (out.is_dir() and not entries(out)):
        return
    if not out.is_dir() or (listed := _artifact_files(out)) is None:
        raise OutputError(
            f"{out} exists and is not an artifact of ours; it is left alone",
            hint="write to another place, or remove it yourself",
        )
    foreign = sorted({*entries(out)} - listed)
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
    for name in unfinished.DESCRIPTIONS:
        try:
            data = read_json(folder / name)
        except ConfigError:
            continue
        if sealed.is_ours(data):
            return {name, *data["files"]}
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
