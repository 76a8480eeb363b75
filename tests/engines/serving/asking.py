"""Asking a scheduler from tests, as clients do: in any number of threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

from edgevlm.engines.runtime.session import Question, Session
from edgevlm.engines.serving.job import Ended, Event, Failed, Job, Piece
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.scheduler import Scheduler

FEW = Limits(slots=3, queue=50)


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
