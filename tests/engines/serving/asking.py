"""Asking a scheduler from tests, as clients do: in any number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from queue import SimpleQueue
from threading import Event as Flag

import pytest

from edgevlm.engines.runtime.session import Question, Session
from edgevlm.engines.serving.job import Ended, Event, Failed, Job, Piece
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.scheduler import Scheduler

FEW = Limits(slots=3, queue=50)


def wait_for(ready: Callable[[], object]) -> None:
    """Until something is so that another thread brings about, a minute at most."""
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.001)


def held(
    patch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    until: Callable[[], object],
    *,
    after: int = 0,
    when: Callable[..., object] = lambda *given: True,
) -> Flag:
    """Let the calls of a method wait until something is so, from the one of number `after` on, and
    of those `when` chooses by what they are given. The method itself is the real one.

    What a test does meanwhile comes before what the call would lead to, however busy the machine
    is. Returns a flag that is set when a call waits.
    """
    real, numbers, reached = getattr(owner, name), count(), Flag()

    def call(*given: object, **named: object) -> object:
        if when(*given) and next(numbers) >= after:
            reached.set()
            wait_for(until)
        return real(*given, **named)

    patch.setattr(owner, name, call)
    return reached


class Asked:
    """A job in the queue of a scheduler, and its events."""

    def __init__(self, scheduler: Scheduler, question: Question, **options: object) -> None:
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.pieces: list[Piece] = []
        self.job = Job(scheduler.session, question, self.events.put, **options)  # type: ignore[arg-type]
        self.job.prepare()
        scheduler.submit(self.job)

    def next(self) -> Event:
        """The next event, within a minute."""
        found = self.events.get(timeout=60)
        if isinstance(found, Piece):
            self.pieces.append(found)
        return found

    def ended(self) -> Ended:
        """The whole answer. Raises what the job failed with."""
        found = self.next()
        while isinstance(found, Piece):
            found = self.next()
        if isinstance(found, Failed):
            raise found.error
        return found


@contextmanager
def scheduling(
    session: Session, limits: Limits = FEW, *, strict: bool = False, speculate: bool = False
) -> Iterator[Scheduler]:
    """A scheduler that is closed at the end."""
    scheduler = Scheduler(session, limits, strict=strict, speculate=speculate)
    try:
        yield scheduler
    finally:
        scheduler.close()


def all_tokens(scheduler: Scheduler, questions: Sequence[Question]) -> list[tuple[int, ...]]:
    """The tokens of all answers, asked at the same time."""
    asked = [Asked(scheduler, question) for question in questions]
    return [one.ended().answer.token_ids for one in asked]
