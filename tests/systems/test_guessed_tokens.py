"""Guessing tokens (`--speculate`) leaves the golden answers of all systems as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import pytest

from edgevlm.engines.runtime.session import Question, Session
from edgevlm.engines.serving.job import Job
from edgevlm.engines.serving.limits import Limits
from tests.conftest import golden_case
from tests.engines.serving.asking import Asked, scheduling
from tests.pipeline import ask, engine_of
from tests.systems import test_comm, test_mlcd_golden, test_original_goldens
from tests.systems.test_huggingface import IMAGE

ORIGINALS = test_original_goldens.CASES
MLCD = ("mlcd_llavanext_e2e", "mlcd_seg")
ALONE = Limits(slots=1, queue=1)
Case: TypeAlias = "tuple[Question, list[int]]"  # and the tokens of its answer


def original(name: str, work: Path) -> tuple[Path, list[Case]]:
    golden = test_original_goldens.Golden(golden_case(name))
    expected = golden.outputs["greedy_ids"].reshape(-1).tolist()
    question = Question(golden.case["prompt"], [golden.image], len(expected), template="none")
    return engine_of(golden.checkpoint, work), [(question, expected)]


def mlcd(name: str, work: Path) -> tuple[Path, list[Case]]:
    golden = test_mlcd_golden.Golden(golden_case(name))
    engine = engine_of(golden.folder, work)
    if name == "mlcd_seg":
        expected = golden.outputs["ask.greedy_ids"].tolist()
        return engine, [
            (asked(golden.meta["ask_prompt"], golden.images[:1], len(expected)), expected)
        ]
    cases = []
    for number, images in enumerate(("one_image", "two_images"), 1):
        expected = golden.outputs[f"{images}.greedy_ids"].tolist()
        text = golden.meta[f"prompt_{images}"]
        cases.append((asked(text, golden.images[:number], len(expected)), expected))
    return engine, cases


def comm(work: Path) -> tuple[Path, list[Case]]:
    """Of COMM there is no golden: what its engine says without guesses, as transformers does."""
    test_comm.write(work / "comm")
    engine = engine_of(work / "comm", work)
    text, images = test_comm.PROMPT, [IMAGE]
    return engine, [(asked(text, images, 16), list(ask(engine, text, images, 16).token_ids))]


def asked(text: str, images: Sequence[Path], tokens: int) -> Question:
    return Question(text, list(images), tokens, template="none")


@pytest.mark.parametrize("name", [*ORIGINALS, *MLCD, "comm"])
def test_golden_answers_are_the_same_with_guesses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is looked up, and with guesses that come in every call: right ones, and such that
    a wrong one follows after none, one or two that are right.
    """
    made = {"comm": comm}.get(name) or (lambda work: (original, mlcd)[name in MLCD](name, work))
    engine, cases = made(tmp_path)
    with (
        Session.open(engine, threads=1) as session,
        scheduling(session, ALONE, speculate=True) as s,
    ):
        for question, expected in cases:
            assert list(Asked(s, question).ended().answer.token_ids) == expected
            for right in range(4):
                before = s.counts.right
                monkeypatch.setattr(Job, "guessed", guesses(expected, right))
                assert list(Asked(s, question).ended().answer.token_ids) == expected
                assert (s.counts.right > before) == bool(right)
                monkeypatch.undo()
        assert s.counts.guessed > 0


def guesses(expected: Sequence[int], right: int) -> object:
    """Guesses of three tokens, of which so many are the next ones of `expected`."""

    def guessed(job: Job) -> list[int]:
        coming = expected[len(job._ids) : len(job._ids) + 3]
        found = [token if at < right else abs(token - 1) for at, token in enumerate(coming)]
        return found[: max(job._limit - len(job._ids) - 1, 0)]

    return guessed
