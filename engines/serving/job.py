"""One request among many: the stages of a Reply, taken one at a time by a scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from edgevlm.engines.backends.tensors import Tensor
from edgevlm.engines.runtime.clock import Span
from edgevlm.engines.runtime.reply import Prepared
from edgevlm.engines.runtime.session import Answer, Question, Reply, Session, Token
from edgevlm.engines.serving.image_cache import ImageCache
from edgevlm.engines.serving.lookup import Guesses, guess
from edgevlm.engines.serving.prompt_key import prompt_key
from edgevlm.toolkit.errors import PromptTooLong
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.prompts import PromptSequence


@dataclass(frozen=True)
class Chosen:
    """How likely a token was. logprob: natural logarithm of its probability before any setting
    changed it; top: the likeliest tokens with theirs, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """One more token of the answer."""

    token: Token
    chosen: Chosen | None


@dataclass(frozen=True)
class Ended:
    """The answer is complete. reused_tokens: of the prompt, found in a KV cache."""

    answer: Answer
    reused_tokens: int


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: Exception


Event: TypeAlias = "Piece | Ended | Failed"


class Job(Reply):
    """A question, and how far its answer has come.

    sink: is called with every event, in the scheduler's thread; it must not wait. logprobs: how
    many of the likeliest tokens are reported beside each token, None for no probabilities. room:
    tokens that the context must leave for the answer.
    """

    def __init__(
        self,
        session: Session,
        question: Question,
        sink: Callable[[Event], None],
        *,
        logprobs: int | None = None,
        seconds: float = float("inf"),
        room: int = 1,
    ) -> None:
        super().__init__(session, question)
        self.sink = sink
        self.deadline = time.monotonic() + seconds
        self.cancelled = False
        self.slot = self.held = self.reused = 0
        self._logprobs, self._guesses, self._room = logprobs, Guesses(), room
        self._ready: Prepared | None = None
        self._clock_started = 0.0
        self._ended: Ended | None = None

    def prepare(self) -> Job:
        """Decode images, render and tokenize: in the caller's thread, before the job waits.

        Raises what asking a session raises.
        """
        self._ready = self._prepared()
        self._clock_started = self._clock.now_ms()
        return self

    @property
    def has_images(self) -> bool:
        """Whether anything is to be encoded, or to be found encoded."""
        return bool(self._question.images)

    def place(self, images: ImageCache) -> None:
        """Encode the images, or find them encoded; then `sequence`, `features` and `key` are set.

        Raises InputError for a prompt beyond the context.
        """
        ready, now = self._ready or self._prepared(), self._clock.now_ms()
        self._clock.spans.append(Span("queue", self._clock_started, now - self._clock_started))
        features, encoded = images.encode(ready.images, self._clock, tiles=ready.tiles)
        self._ready = None  # the images themselves are needed no more
        self.sequence: PromptSequence = self._assembled(ready, features)
        self._sequence = self.sequence
        self.features: Tensor = features.rows
        self.key: Array = prompt_key(self.sequence, encoded)
        self._processors = self._made_processors(self.sequence)
        context = self._session.engine.context
        if self.sequence.length + self._room - 1 > context:
            raise PromptTooLong(
                f"the prompt has {self.sequence.length} tokens, and the engine's context of "
                f"{context} leaves no room for an answer of {self._room}",
                hint="shorten the prompt, or build with a larger --max-context",
            )
        self._limit = min(self._question.max_tokens, context - self.sequence.length + 1)

    def reading(self, ms_since: float) -> None:
        """A piece of the prompt was read, which began at `ms_since`."""
        self._clock.spans.append(Span("prefill", ms_since, self._clock.now_ms() - ms_since))

    def now_ms(self) -> float:
        """Milliseconds since the job was made."""
        return self._clock.now_ms()

    @property
    def last(self) -> int:
        """The token that is to be read next."""
        return self._ids[-1]

    @property
    def position(self) -> int:
        """Where it belongs."""
        return self.sequence.length + len(self._ids) - 1

    def reusable(self) -> Array:
        """The key of what others may use of the job's slot: what was read of the prompt, except
        the last position, whose logits were asked for: it may have been read in another form.
        """
        return self.key[: min(self.held, len(self.key) - 1)]

    @property
    def filled(self) -> int:
        """Positions of the slot that the job needs."""
        return self.position if self._ids else self.held

    def guessed(self) -> list[int]:
        """Tokens that may come next, after the last one; none if they would not fit."""
        most = min(self._guesses.most(), self._limit - len(self._ids) - 1)
        if most < 1:
            return []
        return guess(np.concatenate([self.key, np.asarray(self._ids, np.int64)]), most)

    def were_right(self, right: int, guessed: int) -> None:
        """So many of the tokens guessed were chosen."""
        self._guesses.were(right, guessed)

    def choose(self, logits: Array) -> bool:
        """Choose the next token and report it; whether the answer is complete, which `end` tells.

        Raises what choosing raises.
        """
        token, last = self._next(logits, last=len(self._ids) + 1 >= self._limit)
        chosen = None if self._logprobs is None else _chosen(logits, token.id, self._logprobs)
        self.sink(Piece(token, chosen))
        if last:
            self._done = True
            self._ended = Ended(self.answer, self.reused)
        return last

    def end(self) -> None:
        """Report that the answer is complete: when the job has left its slot and was counted."""
        assert self._ended is not None
        self.sink(self._ended)


def _chosen(logits: Array, token: int, most: int) -> Chosen:
    """The exponentials are those of float32, 150,000 of which take a fifth of a millisecond."""
    largest = float(logits.max())
    shift = largest + float(np.log(np.exp(logits - np.float32(largest)).sum(dtype=np.float64)))
    best: Sequence[int] = []
    if most:
        ids = np.argpartition(-logits, min(most, len(logits) - 1))[:most]
        best = [int(i) for i in ids[np.argsort(-logits[ids], kind="stable")]]
    return Chosen(float(logits[token]) - shift, tuple((i, float(logits[i]) - shift) for i in best))
