"""Runs cases in worker processes, and collects what they found."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import ROOT
from tests.fuzz.cases import CLASSES, class_of
from tests.fuzz.frame import Place

_PIECE = 5000  # cases of one process: what it keeps for ever is looked at when it ends


@dataclass(frozen=True)
class Finding:
    """A case that broke the contract; `key` repeats it."""

    name: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.name} {self.key}: {self.what}\n  repeat: {repeating(self.name, self.key)}"


@dataclass
class Report:
    """What became of the cases: outcomes by class, and findings."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[float, str] = (0.0, "")


def repeating(name: str, key: str) -> str:
    """The command that checks one case again."""
    return shlex.join(["python", "-m", "tests.fuzz", "repeat", name, key])


def jobs_of(count: int, seed: int, names: Sequence[str]) -> list[str]:
    """`count` mutations from number `seed` on, a class and a key each."""
    return [f"{class_of(n, names).name} {n}" for n in range(seed, seed + count)]


def seeds_of(ready: Path, work: Path, names: Sequence[str]) -> list[str]:
    """Every seed of the classes."""
    among = [kind for kind in CLASSES if not names or kind.name in names]
    return [f"{kind.name} ={key}" for kind in among for key in kind(Place(ready, work)).seeds()]


def check(
    jobs: Sequence[str], ready: Path, tell: Callable[[Finding], object] = lambda found: None
) -> Report:
    """Check the cases in order; `tell` gets each finding at once."""
    report, left = Report(), list(jobs)
    while left:
        done = 0
        for finding in _one_process(left[:_PIECE], ready, report):
            done += 1
            if finding is not None:
                report.findings.append(finding)
                tell(finding)
        left = left[done:]
    return report


def _one_process(jobs: Sequence[str], ready: Path, report: Report) -> Iterator[Finding | None]:
    """A finding or None for each case, until all are checked or the process dies of one."""
    command = [sys.executable, "-m", "tests.fuzz.worker", str(ready)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as complaints,
        subprocess.Popen(
            command,
            cwd=ROOT,
            text=True,
            errors="replace",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # what it died of stands in its complaints
            process.stdin.write("\n".join(jobs))
            process.stdin.close()
        begun: list[str] | None = None
        for line in process.stdout:
            told = json.loads(line)
            if "begun" in told:
                begun = told["begun"]
                continue
            assert begun is not None
            name, key = begun
            begun = None
            _count(report, name, key, told)
            what = f"{told['found']}\n  case: {told['case']}" if told["found"] else ""
            yield Finding(name, key, what) if what else None
        process.wait()
        complaints.seek(0)
        last = complaints.read()
    if begun is not None:
        yield Finding(
            begun[0], begun[1], f"the process died with {process.returncode}:\n{last[-3000:]}"
        )
    elif process.returncode:
        raise RuntimeError(f"the worker failed outside of a case: {last[-3000:]}")


def _count(report: Report, name: str, key: str, told: dict[str, object]) -> None:
    report.outcomes[f"{name}: {told['outcome'] or 'FOUND'}"] += 1
    seconds, mb = float(str(told["seconds"])), float(str(told["mb"]))
    report.slowest = max(report.slowest, (seconds, f"{name} {key}"))
    report.largest = max(report.largest, (mb, f"{name} {key}"))
