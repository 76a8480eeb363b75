"""What a class of cases is, and what holds for every refusal.

A class (images, requests, ...) has seeds, mutates them, and checks what became of a case. A check
returns a word for the statistics; it raises Violation where the contract is broken, and whatever
else escapes it is a finding too. Time, memory and deaths are watched by worker.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from random import Random
from typing import Protocol, TypeVar

from edgevlm.toolkit.errors import ToolkitError
from edgevlm.toolkit.terminal import failures
from tests.refusals import check_contract

C = TypeVar("C")
REFUSED = "refused"


class Violation(AssertionError):
    """A case broke the contract."""


@dataclass(frozen=True)
class Place:
    """ready: a folder with `bundle` and `engine-cpu` of the tiny LLaVA-1.5, which is only read.
    work: a folder for the files of a case.
    """

    ready: Path
    work: Path


class Cases(Protocol[C]):
    """A class of cases. share: how many of 16 cases are its own."""

    name: str
    share: int

    def __init__(self, place: Place) -> None: ...

    def seeds(self) -> Mapping[str, C]:
        """Cases to begin with, by name: right ones, and past findings. Each is checked too."""
        ...

    def mutate(self, rng: Random, seed: C) -> C:
        """Another case, decided by `rng` and `seed` alone."""
        ...

    def check(self, case: C) -> str:
        """One word of what became of the case. Raises Violation."""
        ...


def refused(error: ToolkitError) -> str:
    """REFUSED, after checking the form in which the command line prints the error."""
    with redirect_stderr(StringIO()) as printed:
        failures.fail(error.message, error.hint, 1)
    return refused_as_printed(printed.getvalue())


def refused_as_printed(err: str) -> str:
    """REFUSED, after checking what the command line printed. Raises Violation."""
    try:
        check_contract(err)
    except AssertionError as odd:
        raise Violation(f"the form of a refusal: {odd}") from None
    if not all(letter.isprintable() or letter == "\n" for letter in err):
        raise Violation(f"a refusal with control characters: {err!a}")
    return REFUSED


@dataclass(frozen=True)
class Changed:
    """A folder in which some files differ: their new bytes by relative path; None: not there."""

    files: Mapping[str, bytes | None]


@contextmanager
def laid_out(base: Path, changed: Changed, place: Path) -> Iterator[Path]:
    """A copy of `base` with the changed files, below `place` for as long as it is used.

    The others are hard links: a check that writes to one of them would spoil the base.
    """
    folder = place / base.name
    shutil.copytree(base, folder, copy_function=_link)
    try:
        for name, data in changed.files.items():
            (folder / name).unlink(missing_ok=True)
            if data is not None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
        yield folder
    finally:
        shutil.rmtree(folder)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy(source, target)
