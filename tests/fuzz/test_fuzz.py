"""The mutation suite itself: it finds what it is to find, and finds nothing in edgevlm."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest

from edgevlm.toolkit.errors import ToolkitError
from tests.fuzz import worker
from tests.fuzz.cases import CLASSES, class_of, named
from tests.fuzz.frame import Changed, Place, Violation, laid_out, refused, refused_as_printed
from tests.fuzz.mutations import changed_bytes, changed_json
from tests.fuzz.run import check, jobs_of, repeating, seeds_of

COUNT, FIRST = 2000, 0


def test_seeds_and_mutations_keep_the_contract(ready: Path, tmp_path: Path) -> None:
    jobs = [*seeds_of(ready, tmp_path, ()), *jobs_of(COUNT, FIRST, ())]
    report = check(jobs, ready)
    assert [str(found) for found in report.findings] == []
    assert report.outcomes.total() == len(jobs)
    for kind in CLASSES:  # mutations that are all refused, or none, would try little
        words = {word for word in report.outcomes if word.startswith(f"{kind.name}: ")}
        assert len(words) > 1, report.outcomes


def test_every_class_gets_its_share() -> None:
    cycle = sum(kind.share for kind in CLASSES)
    for kind in CLASSES:
        assert sum(class_of(n) is kind for n in range(cycle)) == kind.share
        assert class_of(5, [kind.name]) is kind
        assert named(kind.name) is kind


def test_a_number_repeats_its_case(ready: Path, tmp_path: Path) -> None:
    for kind in CLASSES:
        cases = []
        for _ in range(2):
            made = kind(Place(ready, tmp_path))
            seeds = dict(made.seeds())
            cases.append([worker.case_of(made, seeds, str(n)) for n in range(30)])
        assert cases[0] == cases[1]
        assert len({repr(case) for case in cases[0]}) > 20
    assert repeating("images", "=a b") == "python -m tests.fuzz repeat images '=a b'"


class Faulty:
    """Cases that break the contract, each in a way of its own."""

    name, share = "faulty", 1

    def __init__(self, place: Place) -> None:
        self.kept: list[bytes] = []

    def seeds(self) -> Mapping[str, str]:
        return {name: name for name in ("fine", "slow", "large", "escapes", "violates", "warns")}

    def mutate(self, rng: Random, seed: str) -> str:
        return seed

    def check(self, case: str) -> str:
        if case == "slow":
            end = time.process_time() + 9
            while time.process_time() < end:
                pass
        if case == "large":
            self.kept.append(os.urandom(1) * (90 << 20))
        if case == "escapes":
            raise KeyError("defect")
        if case == "violates":
            raise Violation("not as it should be")
        if case == "warns":
            import warnings

            warnings.warn("odd", stacklevel=1)
        return "answered"


FOUND = {
    "fine": "",
    "slow": "hang: more than",
    "large": "memory: ",
    "escapes": "escaped: KeyError: 'defect'",
    "violates": "not as it should be",
    "warns": "escaped: UserWarning: odd",
}


@pytest.mark.parametrize("case", FOUND)
def test_what_breaks_the_contract_is_found(
    case: str, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    monkeypatch.setattr(worker, "MOST_SECONDS", 0.5)
    monkeypatch.setattr(worker, "MOST_MB", 60)
    before = signal.signal(signal.SIGPROF, worker._stop)
    try:
        told: dict[str, Any] = worker._tried(
            Faulty(Place(ready, tmp_path)), {case: case}, f"={case}"
        )
    finally:
        signal.signal(signal.SIGPROF, before)
    assert told["found"].startswith(FOUND[case])
    assert bool(told["found"]) == bool(FOUND[case])


def test_a_refusal_that_shows_too_much_is_found() -> None:
    assert refused(ToolkitError("no", hint="a way")) == "refused"
    assert refused(ToolkitError("x" * 99_999)) == "refused"  # it is cut
    for err in (
        "",
        "Traceback\n",
        f"error: {'x' * 800}\n",
        "error: \x1b[2J\n",
        "error: a\nerror: b\n",
    ):
        with pytest.raises((Violation, IndexError)):
            refused_as_printed(err)


def test_mutations_change_what_they_get() -> None:
    data = {"a": 1, "b": [1, 2, {"c": "text"}], "d": {"e": 0.5}}
    texts = {changed_json(Random(n), data) for n in range(200)}
    assert len(texts) > 150
    assert data == {"a": 1, "b": [1, 2, {"c": "text"}], "d": {"e": 0.5}}
    assert any(len(text) > 100_000 for text in texts)
    assert len({changed_bytes(Random(n), bytes(200)) for n in range(200)}) > 120


def test_a_changed_folder_leaves_the_base_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/a").write_text("a")
    (tmp_path / "base/b").write_text("b")
    changed = Changed({"a": b"new", "b": None, "c/d": b"more"})
    with laid_out(tmp_path / "base", changed, tmp_path / "work") as folder:
        assert (folder / "a").read_text() == "new"
        assert not (folder / "b").exists()
        assert (folder / "c/d").read_bytes() == b"more"
    assert not folder.exists()
    assert sorted(p.name for p in (tmp_path / "base").iterdir()) == ["a", "b"]
    assert (tmp_path / "base/a").read_text() == "a"
