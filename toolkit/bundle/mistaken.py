"""Paths given where an artifact of another kind is expected: what they are, and what to type."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from edgevlm.toolkit.bundle.unfinished import DESCRIPTIONS
from edgevlm.toolkit.errors import BundleError

_SENTENCE = re.compile(r"\s\S+\s|\?$")  # rather a question than a path
_BUNDLE, _ENGINE, _TRAINED, _PUBLISHED = DESCRIPTIONS


def no_engine(path: Path) -> BundleError:
    """The error for a path that is given as an engine and is none."""
    made = f"{_plain(path)}-engine"
    if (path / _BUNDLE).exists():
        hint = f"this is a bundle; build it first: {_command('build', path, made)}"
    elif _is_checkpoint(path):
        bundle = f"{_plain(path)}-bundle"
        steps = f"{_command('export', path, bundle)} && {_command('build', bundle, made)}"
        hint = f"this is a checkpoint; first: {steps}"
    elif (inside := _inside(path, _ENGINE)) is not None:
        hint = f"there is one in it: {inside}"
    elif _SENTENCE.search(str(path)):
        hint = "the engine comes first: edgevlm run ENGINE PROMPT"
    else:
        hint = f"build one: {_command('build', 'BUNDLE', _free(path, 'ENGINE'))}"
    return BundleError(_fault(path, "an engine", _ENGINE), hint=hint)


def no_bundle(path: Path) -> BundleError:
    """The error for a path that is given as a bundle and is none."""
    if (path / _ENGINE).exists():
        hint = f"this is an engine, which is built already: {_command('inspect', path)}"
    elif _is_checkpoint(path):
        bundle = f"{_plain(path)}-bundle"
        hint = f"this is a checkpoint; export it first: {_command('export', path, bundle)}"
    elif (inside := _inside(path, _BUNDLE)) is not None:
        hint = f"there is one in it: {inside}"
    else:
        hint = f"make one: {_command('export', 'CHECKPOINT', _free(path, 'BUNDLE'))}"
    return BundleError(_fault(path, "a bundle", _BUNDLE), hint=hint)


def instead_of_checkpoint(path: Path) -> str:
    """The hint for a path that is given as a checkpoint, and has no config.json."""
    if (path / _ENGINE).exists():
        return "this is an engine; give the checkpoint or the bundle that it was built from"
    for description in (_PUBLISHED, _TRAINED, _BUNDLE):
        if (inside := _inside(path, description)) is not None:
            return f"there is one in it: {inside}"
    return (
        "give a folder with config.json and weights, a model id (ORGANISATION/NAME), or "
        "preset:NAME --random-weights"
    )


def _fault(path: Path, expected: str, description: str) -> str:
    if not os.path.lexists(path):
        why = "it does not exist"
    else:
        why = f"it has no {description}" if path.is_dir() else "it is no folder"
    return f"{path} is not {expected}: {why}"


def _is_checkpoint(path: Path) -> bool:
    return (path / _TRAINED).exists() or (path / _PUBLISHED).exists()


def _inside(path: Path, description: str) -> Path | None:
    """The first folder right below `path` that has this description."""
    try:
        found = sorted(file.parent for file in path.glob(f"*/{description}"))
    except OSError:
        return None
    return found[0] if found else None


def _free(path: Path, otherwise: str) -> str:
    """A name that can be written to: that of `path`, unless a file has it."""
    return otherwise if path.exists() and not path.is_dir() else str(path)


def _plain(path: Path) -> str:
    """A name to put another one behind: without a slash at its end, not only dots."""
    return str(path) if path.name else str(path.resolve())


def _command(*words: object) -> str:
    return shlex.join(["edgevlm", *map(str, words)])
