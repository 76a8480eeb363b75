"""A conversation of several turns with images: what is said, what is kept, what is dropped.

The prompt of a turn is the whole conversation in the model's template. What was read of it before
stays in the KV cache, and images stay encoded, so that a turn costs what is new in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.runtime.session import Answer, Question
from edgevlm.engines.serving.job import Event, Failed, Job, Piece
from edgevlm.engines.serving.scheduler import Scheduler
from edgevlm.toolkit.errors import PromptTooLong
from edgevlm.toolkit.images import decode

_ROOM = 64  # tokens that the context leaves for an answer, at least
# What MLCD-Embodied writes itself: its template ends before the answer's role.
_ROLE = "assistant\n"


@dataclass(frozen=True)
class Settings:
    """As of a Question."""

    max_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    template: str = "auto"
    stop: Sequence[str] = ()


@dataclass(frozen=True)
class Turn:
    """A question and its answer; images: those that came with it."""

    text: str
    images: tuple[Path, ...]
    answer: str


class Conversation:
    """Turns with one engine. images: for the next turn. dropped: turns that were left out."""

    def __init__(self, scheduler: Scheduler, settings: Settings) -> None:
        self._scheduler, self._settings = scheduler, settings
        self.turns: list[Turn] = []
        self.images: list[Path] = []
        self.dropped = 0
        self.last: Answer | None = None

    def add_image(self, path: Path) -> None:
        """Show an image with the next turn. Raises InputError if it cannot be read."""
        decode.load(path)
        self.images.append(path)

    def reset(self) -> None:
        """Forget everything that was said and shown."""
        self.turns, self.images, self.dropped, self.last = [], [], 0, None

    def ask(self, text: str) -> Iterator[str]:
        """The answer as it comes. Where the context is too short, the oldest turns are dropped,
        with their images; `dropped` says how many. A reader that stops keeps what it has read.

        Raises ToolkitError; before the first piece, the conversation is then what it was.
        """
        images, kept = tuple(self.images), list(self.turns)
        while True:
            events = SimpleQueue[Event]()
            job = self._job(kept, text, images, events)
            self._scheduler.submit(job)
            try:
                first = events.get()
                if isinstance(first, Failed):
                    raise first.error
                break
            except PromptTooLong:
                if not kept:
                    raise
                kept = kept[1:]
            except BaseException:
                self._scheduler.cancel(job)
                raise
        self.dropped, self.images, said = len(self.turns) - len(kept), [], ""
        try:
            for piece in self._texts(job, first, events):
                said += piece
                yield piece
        finally:
            self._scheduler.cancel(job)
            self.turns = [*kept, Turn(text, images, self._cleaned(said))]

    def _texts(self, job: Job, found: Event, events: SimpleQueue[Event]) -> Iterator[str]:
        held = "" if self._writes_role else None
        while isinstance(found, Piece):
            piece = found.token.text
            if held is not None:  # the role may not be complete
                held += piece
                piece, held = ("", held) if _ROLE.startswith(held) else (held, None)
                piece = piece.removeprefix(_ROLE)
            if piece:
                yield piece
            found = events.get()
        if isinstance(found, Failed):
            raise found.error
        if held and held != _ROLE:
            yield held
        self.last = job.answer

    def _job(
        self, turns: list[Turn], text: str, images: tuple[Path, ...], events: SimpleQueue[Event]
    ) -> Job:
        said = [part for turn in turns for part in (turn.text, turn.answer)]
        shown = [*(turn.images for turn in turns), images]
        numbers = [2 * number for number, some in enumerate(shown) for _ in some]
        settings = self._settings
        question = Question(
            text,
            [path for some in shown for path in some],
            settings.max_tokens,
            settings.sampling,
            settings.template,
            settings.stop,
            said,
            image_turns=numbers,
        )
        room = min(_ROOM, settings.max_tokens, self._scheduler.session.engine.context // 4)
        return Job(self._scheduler.session, question, events.put, room=max(room, 1)).prepare()

    @property
    def _writes_role(self) -> bool:
        return self.template == "mlcd_chat"

    @property
    def template(self) -> str:
        """The name of the conversation's template."""
        named = self._settings.template
        return self._scheduler.session.model.prompts.template if named == "auto" else named

    def _cleaned(self, answer: str) -> str:
        """The answer as it stands in later prompts."""
        return answer.strip().replace(_ROLE, "") if self._writes_role else answer


def with_images(conversation: Conversation, paths: Sequence[str]) -> None:
    """Show images with the first turn. Raises InputError."""
    for path in paths:
        conversation.add_image(Path(path).expanduser())
