"""While an image is encoded, answers that have begun go on, and questions without one begin."""

from __future__ import annotations

import threading
from collections.abc import Callable
from threading import Event as Flag
from typing import Any

import pytest

from edgevlm.engines.runtime.session import Question, Session
from edgevlm.engines.serving.job import Ended, Piece
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.scheduler import Scheduler
from tests.engines.serving.asking import Asked, held, scheduling
from tests.engines.serving.conftest import GOLDEN

IMAGE = GOLDEN / "image.png"
SEEN = Question("What is in the image?", IMAGE, 8)
LONG = Question("Tell me about cats and dogs, please", (), 60)
SHORT = Question("Why?", (), 5)


def held_encoder(session: Session, patch: pytest.MonkeyPatch, until: Callable[[], object]) -> Flag:
    """What is set when the encoder has got images, which it leaves alone until something is so."""
    return held(patch, session.vision, "encode", until, when=lambda images, *_: images)


def tokens(session: Session, question: Question) -> tuple[int, ...]:
    return session.answer(question).token_ids


def test_decoding_goes_on_and_no_answer_changes(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [tokens(session, question) for question in (SEEN, LONG, SHORT)]
    go = Flag()
    reached = held_encoder(session, monkeypatch, go.is_set)
    with scheduling(session, Limits(slots=3, queue=9)) as scheduler:
        begun = Asked(scheduler, LONG)
        assert isinstance(begun.next(), Piece)
        seen = Asked(scheduler, SEEN)
        assert reached.wait(60)
        pieces = len(begun.pieces)
        while len(begun.pieces) < pieces + 20:  # the encoder is at work all the while
            assert isinstance(begun.next(), Piece)
        second = Asked(scheduler, SEEN)  # waits until the encoder is free
        short = Asked(scheduler, SHORT)  # has no image, and overtakes it
        assert short.ended().answer.token_ids == alone[2]
        assert scheduler.waiting == 1
        assert seen.events.empty() and second.events.empty()
        go.set()
        assert seen.ended().answer.token_ids == second.ended().answer.token_ids == alone[0]
        assert begun.ended().answer.token_ids == alone[1]
        assert (scheduler.images.misses, scheduler.images.hits) == (1, 1)


def test_a_slot_is_kept_for_what_is_being_encoded(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = Flag()
    reached = held_encoder(session, monkeypatch, go.is_set)
    with scheduling(session, Limits(slots=1, queue=9)) as scheduler:
        seen = Asked(scheduler, SEEN)
        assert reached.wait(60)
        short = Asked(scheduler, SHORT)
        assert (scheduler.active, scheduler.waiting) == (1, 1)
        go.set()
        assert isinstance(seen.ended(), Ended) and isinstance(short.ended(), Ended)


def test_a_client_that_leaves_while_its_image_is_encoded(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = Flag()
    reached = held_encoder(session, monkeypatch, go.is_set)
    with scheduling(session, Limits(slots=1, queue=9)) as scheduler:
        gone = Asked(scheduler, SEEN)
        assert reached.wait(60)
        after = Asked(scheduler, SHORT)
        scheduler.cancel(gone.job)
        go.set()
        after.ended()
        assert gone.events.empty()
        assert (scheduler.counts.cancelled, scheduler.counts.answered) == (1, 1)


def test_a_server_that_stops_ends_what_is_encoded(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(session, Limits(slots=1))
    reached = held_encoder(session, monkeypatch, lambda: scheduler._closing)
    seen = Asked(scheduler, SEEN)
    assert reached.wait(60)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
    with pytest.raises(Exception, match="stopping"):
        seen.ended()


def test_a_card_encodes_in_its_turn(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its components share an arena."""
    expected = [tokens(session, SEEN), tokens(session, LONG)]
    monkeypatch.setattr(session, "encodes_beside", False)
    threads = set[str]()
    real = session.vision.encode

    def encode(images: Any, *given: Any, **more: Any) -> Any:
        if images:
            threads.add(threading.current_thread().name)
        return real(images, *given, **more)

    monkeypatch.setattr(session.vision, "encode", encode)
    with scheduling(session) as scheduler:
        both = [Asked(scheduler, question) for question in (SEEN, LONG)]
        assert [one.ended().answer.token_ids for one in both] == expected
    assert threads == {"edgevlm-scheduler"}
