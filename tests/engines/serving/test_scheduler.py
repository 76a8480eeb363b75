"""Many answers at once: each is what it is alone, whoever else asks, leaves or fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Event as Flag
from typing import Any

import numpy as np
import pytest

from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.engines.serving import rows
from edgevlm.engines.serving.job import Ended, Event, Job, Piece
from edgevlm.engines.serving.limits import Busy, Limits, OutOfTime
from edgevlm.engines.serving.scheduler import Scheduler
from edgevlm.toolkit.errors import (
    AccuracyError,
    ConfigError,
    OutOfMemory,
    PromptTooLong,
    UnsupportedError,
)
from tests.engines.serving.asking import FEW, Asked, all_tokens, held, scheduling
from tests.engines.serving.conftest import GOLDEN

IMAGE = GOLDEN / "image.png"
QUESTIONS = (
    Question("What is in the image?", IMAGE, 16),
    Question("Tell me about cats and dogs, please", (), 16),
    Question("Why?", (), 9, Sampling(1.0, 20, 0.9, seed=5)),
    Question("What is there?", IMAGE, 24),
    Question("And two of them?", (IMAGE, IMAGE), 11),
    Question("A longer one. " * 5, (), 30),
)


@pytest.fixture(scope="module")
def alone(engine: Path) -> list[tuple[int, ...]]:
    """Each answer of a session that does nothing else."""
    with Session.open(engine, threads=1) as session:
        return [session.answer(question).token_ids for question in QUESTIONS]


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_answers_do_not_depend_on_what_else_is_answered(
    slots: int, session: Session, alone: list[tuple[int, ...]]
) -> None:
    with scheduling(session, Limits(slots=slots, queue=50)) as scheduler:
        for step in (1, -1):
            found = all_tokens(scheduler, QUESTIONS[::step] * 4)
            assert found == alone[::step] * 4
        assert scheduler.counts.answered == 48
        assert scheduler.active == scheduler.waiting == 0


@pytest.mark.parametrize("strict", [False, True])
def test_who_hears_that_an_answer_ended_finds_it_counted_and_its_slot_free(
    strict: bool, session: Session
) -> None:
    with scheduling(session, Limits(slots=1), strict=strict) as scheduler:
        seen = SimpleQueue[tuple[type, int, int, int, int]]()

        def sink(event: Event) -> None:
            counts = scheduler.counts
            done = counts.answered, counts.output_tokens, counts.steps, scheduler.active
            seen.put((type(event), *done))

        for number, tokens in enumerate((1, 4), 1):
            scheduler.submit(Job(session, Question("Why?", (), tokens), sink).prepare())
            told = [seen.get(timeout=60) for _ in range(tokens + 1)]
            assert [kind for kind, *_ in told] == [*[Piece] * tokens, Ended]
            assert told[-1][1:] == (number, (1, 5)[number - 1], (0, 3)[number - 1], 0)


def test_slots_that_cannot_be_moved_are_decoded_where_they_are(
    session: Session, alone: list[tuple[int, ...]]
) -> None:
    """As those of a graphics card."""
    with scheduling(session) as scheduler:
        scheduler.slots.movable = False
        assert all_tokens(scheduler, QUESTIONS * 3) == alone * 3
        assert scheduler.counts.reused_tokens > 0  # of the slot itself


def test_rounded_rows_are_filled_up_so_that_answers_stay_the_same(rounded: Path) -> None:
    with Session.open(rounded, threads=1) as session:
        with scheduling(session, Limits(slots=4)) as scheduler:
            first = [all_tokens(scheduler, [question])[0] for question in QUESTIONS]
            assert all_tokens(scheduler, QUESTIONS * 3) == first * 3
        with scheduling(session, strict=True) as scheduler:
            own = [session.answer(question).token_ids for question in QUESTIONS]
            assert all_tokens(scheduler, QUESTIONS * 2) == own * 2
            assert scheduler.counts.reused_tokens == 0


def test_rows_that_agree_in_no_number_are_refused(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, generator = session.decode_batch, np.random.default_rng(1)

    def noisy(*given: Any) -> Any:
        logits = real(*given)
        return logits + np.asarray(generator.standard_normal(logits.shape), np.float32)

    monkeypatch.setattr(session, "decode_batch", noisy)
    with pytest.raises(UnsupportedError, match="differently") as refused:
        rows.rows_together(session, 16, strict=False)
    assert "--strict" in refused.value.hint


@pytest.mark.parametrize("tile", [1, 2, 4])
def test_the_number_of_rows_is_that_of_the_kernel(
    tile: int, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that rounds otherwise what is left over after `tile` rows at a time."""
    real = session.decode_batch

    def tiled(*given: Any) -> Any:
        logits = real(*given)
        logits[len(logits) // tile * tile :] *= np.float32(1 + 1e-6)
        return logits

    monkeypatch.setattr(session, "decode_batch", tiled)
    together, state = rows.rows_together(session, 7, strict=False)
    assert (together, state.count) == (tile, -(-7 // tile) * tile)


def test_a_second_question_reads_only_what_is_new(session: Session) -> None:
    with scheduling(session) as scheduler:
        first = Asked(scheduler, QUESTIONS[0]).ended()
        again = Asked(scheduler, QUESTIONS[3]).ended()
        assert first.reused_tokens == 0
        assert again.reused_tokens >= 64
        assert (scheduler.images.misses, scheduler.images.hits) == (1, 1)
        assert "encoder.clip" in first.answer.timings_ms
        assert "encoder.clip" not in again.answer.timings_ms
        assert again.answer.prompt_tokens > again.reused_tokens + 1


def test_the_same_pixels_in_another_file_are_the_same_image(
    session: Session, tmp_path: Path
) -> None:
    from PIL import Image

    Image.open(IMAGE).save(tmp_path / "copy.bmp")
    Image.open(IMAGE).rotate(90).save(tmp_path / "other.png")
    with scheduling(session) as scheduler:
        counts = []
        for path in (IMAGE, tmp_path / "copy.bmp", tmp_path / "other.png"):
            counts.append(Asked(scheduler, Question("Why?", path, 2)).ended().reused_tokens)
        assert scheduler.images.misses == 2
        assert counts[1] > counts[2]


def test_a_client_that_leaves_frees_its_slot_within_a_token(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scheduling(session, Limits(slots=1)) as scheduler:
        gone = Flag()
        reached = held(monkeypatch, session, "decode_batch", gone.is_set, after=2)
        left = Asked(scheduler, Question("Tell me everything", (), 400))
        for _ in range(3):  # the first one comes with the prompt
            left.next()
        assert reached.wait(60)
        scheduler.cancel(left.job)
        gone.set()
        assert len(Asked(scheduler, QUESTIONS[1]).ended().answer.token_ids) == 16
        assert scheduler.counts.cancelled == 1
        assert len(left.job._ids) == 3 + 1  # the step that was under way
        assert scheduler.counts.steps == 3 + 15


def test_who_leaves_the_queue_is_not_answered(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scheduling(session, Limits(slots=1)) as scheduler:
        gone = Flag()
        held(monkeypatch, session, "decode_batch", gone.is_set)
        first = Asked(scheduler, Question("Tell me everything", (), 40))
        waiting = Asked(scheduler, QUESTIONS[0])
        scheduler.cancel(waiting.job)
        gone.set()
        first.ended()
        Asked(scheduler, QUESTIONS[1]).ended()
        assert waiting.events.empty()
        assert scheduler.counts.cancelled == 1


def test_a_full_queue_refuses(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with scheduling(session, Limits(slots=1, queue=1)) as scheduler:
        refused = Flag()
        held(monkeypatch, session, "decode_batch", refused.is_set)
        long = Asked(scheduler, Question("Tell me everything", (), 300))
        long.next()
        waits = Asked(scheduler, QUESTIONS[1])
        with pytest.raises(Busy, match="1 requests are waiting"):
            Asked(scheduler, QUESTIONS[1])
        refused.set()
        scheduler.cancel(long.job)
        assert len(waits.ended().answer.token_ids) == 16


def test_time_runs_out(session: Session) -> None:
    with scheduling(session, Limits(slots=1)) as scheduler:
        with pytest.raises(OutOfTime, match="have passed"):
            Asked(scheduler, Question("Tell me everything", (), 400), seconds=0.0).ended()
        assert len(Asked(scheduler, QUESTIONS[1]).ended().answer.token_ids) == 16
        assert scheduler.counts.failed == 1


def test_a_prompt_that_is_too_long_fails_by_itself(
    session: Session, alone: list[tuple[int, ...]]
) -> None:
    with scheduling(session) as scheduler:
        others = [Asked(scheduler, question) for question in QUESTIONS[:2]]
        long = Asked(scheduler, Question("a b " * session.engine.context, (), 4))
        with pytest.raises(PromptTooLong, match="context"):
            long.ended()
        assert [one.ended().answer.token_ids for one in others] == alone[:2]


def failing(real: Callable[..., Any], at: int) -> Callable[..., Any]:
    """A function that raises once, in its call `at`."""
    calls = iter(range(1 << 30))

    def call(*given: Any, **named: Any) -> Any:
        if next(calls) == at:
            raise RuntimeError("no more")
        return real(*given, **named)

    return call


@pytest.mark.parametrize("stage", ["decode_batch", "read_piece", "encode"])
def test_a_call_that_fails_ends_its_answers_alone(
    stage: str, session: Session, alone: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with scheduling(session) as scheduler:
        monkeypatch.setattr(session, stage, failing(getattr(session, stage), 1))
        asked = [Asked(scheduler, question) for question in (*QUESTIONS, *QUESTIONS)]
        failed = 0
        for number, one in enumerate(asked):
            try:
                assert one.ended().answer.token_ids == alone[number % len(alone)]
            except RuntimeError:
                failed += 1
        assert failed in range(1, FEW.slots + 1) if stage == "decode_batch" else failed == 1
        assert all_tokens(scheduler, QUESTIONS) == alone


def test_an_answer_without_numbers_ends_alone(
    session: Session, alone: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(logits: Any) -> int:
        raise AccuracyError("NaN")

    with scheduling(session) as scheduler:
        is_broken = Flag()
        held(monkeypatch, session, "read_piece", is_broken.is_set)
        asked = [Asked(scheduler, question) for question in QUESTIONS[:3]]
        monkeypatch.setattr(asked[1].job, "_sample", broken)
        is_broken.set()
        with pytest.raises(AccuracyError, match="NaN"):
            asked[1].ended()
        assert asked[0].ended().answer.token_ids == alone[0]
        assert asked[2].ended().answer.token_ids == alone[2]


def test_logprobs_are_those_of_the_model(session: Session) -> None:
    with scheduling(session) as scheduler:
        asked = Asked(scheduler, QUESTIONS[1], logprobs=3)
        ended = asked.ended()
    assert [piece.token.id for piece in asked.pieces] == list(ended.answer.token_ids)
    for piece in asked.pieces:
        assert piece.chosen is not None
        assert piece.chosen.top[0] == (piece.token.id, piece.chosen.logprob)  # greedy
        values = [value for _, value in piece.chosen.top]
        assert values == sorted(values, reverse=True)
        assert len(values) == 3
        assert sum(np.exp(values)) <= 1


def test_guessed_tokens_change_no_greedy_answer(
    session: Session, alone: list[tuple[int, ...]]
) -> None:
    with scheduling(session, speculate=True) as scheduler:
        assert [all_tokens(scheduler, [question])[0] for question in QUESTIONS] == alone
        assert scheduler.counts.guessed > 0
        assert all_tokens(scheduler, QUESTIONS * 2) == alone * 2


@pytest.mark.parametrize("wrong_after", [0, 1, 2, 3])
def test_guesses_are_kept_as_far_as_they_are_right(
    wrong_after: int,
    session: Session,
    alone: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer itself is guessed, three tokens at a time, up to the first wrong one."""
    number = 5

    def guessed(job: Job) -> list[int]:
        done = len(job._ids)
        coming = list(alone[number][done : done + 3])
        return [i if at < wrong_after else i ^ 1 for at, i in enumerate(coming)][:-1] or []

    monkeypatch.setattr(Job, "guessed", guessed)
    with scheduling(session, speculate=True) as scheduler:
        found = Asked(scheduler, QUESTIONS[number]).ended()
        assert found.answer.token_ids == alone[number]
        assert scheduler.counts.output_tokens == 30
        assert scheduler.counts.right == scheduler.counts.guessed * min(wrong_after, 2) // 2
        monkeypatch.undo()
        assert all_tokens(scheduler, QUESTIONS * 2) == alone * 2


def test_stopping_lets_answers_finish_or_says_so(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(session, FEW)
    asked = Asked(scheduler, QUESTIONS[1])
    scheduler.close(60)
    assert len(asked.ended().answer.token_ids) == 16
    with pytest.raises(Busy, match="stopping"):
        Asked(scheduler, QUESTIONS[1])
    scheduler = Scheduler(session, FEW)
    held(monkeypatch, session, "decode_batch", lambda: scheduler._closing)
    asked = Asked(scheduler, Question("Tell me everything", (), 400))
    assert isinstance(asked.next(), Piece)
    scheduler.close()
    with pytest.raises(OutOfTime, match="stopping"):
        asked.ended()


def test_what_has_no_meaning_is_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--slots 0"):
        Limits(slots=0).check()
    with pytest.raises(ConfigError, match="--queue -1"):
        Limits(queue=-1).check()
    with pytest.raises(ConfigError, match="exclude"):
        Scheduler(session, FEW, strict=True, speculate=True)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(OutOfMemory, match="3 slots"):
        Scheduler(session, FEW)


def test_nothing_to_do_is_nothing_done(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that failed or left keep the thread from waiting no more than those that ended."""
    with scheduling(session) as scheduler:
        looks, real = list[None](), scheduler._due

        def due() -> bool:
            looks.append(None)
            return real()

        monkeypatch.setattr(scheduler, "_due", due)
        with pytest.raises(PromptTooLong):
            Asked(scheduler, Question("a b " * session.engine.context, (), 4)).ended()
        with pytest.raises(OutOfTime):
            Asked(scheduler, QUESTIONS[0], seconds=0.0).ended()
        scheduler.cancel(Asked(scheduler, QUESTIONS[2]).job)
        Asked(scheduler, QUESTIONS[1]).ended()
        before = len(looks)
        time.sleep(0.1)
        assert len(looks) <= before + 1  # it looks once more, and waits
