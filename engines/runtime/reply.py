"""A reply: a stream of tokens, then the answer with its timings."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgevlm.engines.backends.tensors import Tensor
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.memory import peak_rss_mb
from edgevlm.engines.runtime.processors import (
    Processors,
    counted_ids,
    sampling_notes,
    settled,
)
from edgevlm.engines.runtime.question import Question
from edgevlm.engines.runtime.sampling import sampler
from edgevlm.engines.runtime.segmentation import Mask, MasksOfReply
from edgevlm.engines.runtime.stopping import StoppingText
from edgevlm.engines.runtime.vision import Features
from edgevlm.toolkit.errors import InputError, PromptTooLong
from edgevlm.toolkit.images import decode
from edgevlm.toolkit.images.decode import LoadedImage
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.text.prompts import Prompt, PromptSequence

if TYPE_CHECKING:
    from edgevlm.engines.runtime.session import Session

Finish = Literal["stop", "length", "given"]


@dataclass(frozen=True)
class Token:
    """One generated token: the text that became certain with it, and when, in ms after the start.

    The last token brings the rest of the text: the texts of all tokens joined are the answer's.
    """

    id: int
    text: str
    ms: float


@dataclass(frozen=True)
class Answer:
    """A finished reply. timings_ms: stages by name; notes: on images and prompt. segments: the
    masks, image after image; None of a model that makes none.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int
    finish_reason: Finish
    timings_ms: dict[str, float]
    output_token_throughput: float
    output_token_throughput_per_user: float
    peak_rss_mb: float
    notes: tuple[str, ...] = ()
    segments: tuple[Mask, ...] | None = None

    @property
    def masks(self) -> list[Array]:
        """For each mask, bool [height, width] of its image: where the object is."""
        return [mask.pixels for mask in self.segments or ()]

    @property
    def logits(self) -> list[Array]:
        """For each mask, float32 [height, width]: above 0 where the object is."""
        return [mask.logits for mask in self.segments or ()]


@dataclass(frozen=True)
class Prepared:
    """A question before any component runs. reused: whether the last image has two slots."""

    prompt: Prompt
    images: tuple[LoadedImage, ...]
    tiles: bool
    reused: bool


class Reply:
    """Iterate once for tokens, then read `answer`.

    A reply holds a KV state of its own from its prefill until its last token is computed, it is
    closed, or its iterator is dropped. Several replies of one session may be read in turns, and
    from several threads.
    """

    def __init__(self, session: Session, question: Question) -> None:
        self._session = session
        self._question = question.checked()
        self._masks = MasksOfReply(session) if session.segmentation else None
        if self._masks is None and self._question.answer is not None:
            raise InputError(
                f"the answer is given, and {session.model.name} makes no masks of it",
                hint="leave it out (--force-seg): the model answers in text alone",
            )
        self._clock = Clock()
        self._sample = sampler(self._question.sampling)
        self._ids: list[int] = []
        self._times_ms: list[float] = []
        stops = (*self._question.stop, *session.model.generation.stop_strings)
        self._text = StoppingText(session.tokenizer, stops)
        self._finish: Finish = "length"
        self._notes: tuple[str, ...] = ()
        self._sequence: PromptSequence | None = None
        self._begun = self._closed = self._done = False
        # Weak: a reply that held its iterator would form a cycle and release its state late.
        self._iterator: weakref.ref[Generator[Token, None, None]] | None = None

    def __iter__(self) -> Iterator[Token]:
        """The tokens as they come. Raises InputError where they were read or closed before."""
        if self._begun or self._closed:
            raise InputError(
                f"this reply {'was closed' if self._closed else 'is being read or was read'}",
                hint="keep its tokens, read its answer, or ask the session again",
            )
        self._begun = True
        tokens = self._tokens()
        self._iterator = weakref.ref(tokens)
        return tokens

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop, and release the state; a finished reply keeps its answer."""
        self._closed = True
        tokens = self._iterator() if self._iterator else None
        if tokens is not None:
            with suppress(ValueError):  # another thread is computing a token and stops after it
                tokens.close()

    def _tokens(self) -> Generator[Token, None, None]:
        session = self._session
        sequence, features = self._read()
        self._sequence = sequence
        self._processors = self._made_processors(sequence)
        limit = min(self._question.max_tokens, session.engine.context - sequence.length + 1)
        state = session.states.take()
        try:
            with self._clock.time("prefill"):
                logits = session.prefill(sequence, features, state)
            given = self._question.answer
            token, last = (
                self._next(logits, last=limit == 1) if given is None else self._given(given)
            )
            while not (last or self._closed):
                yield token
                position = sequence.length + len(self._ids) - 1
                logits = session.decode(token.id, position, state)
                token, last = self._next(logits, last=len(self._ids) + 1 == limit)
            if last and self._masks is not None:
                self._masks.collect(sequence, self._ids, given is not None, state)
        finally:
            session.states.give(state)
        if last:
            self._done = True
            yield token

    def _made_processors(self, sequence: PromptSequence) -> Processors:
        """What changes the logits of this reply, by the checkpoint's rules and the question's."""
        session = self._session
        prompts, rules = session.model.prompts, session.model.generation
        seen: list[int] = []
        if prompts.splice == "token":  # the originals hand embeddings to `generate`, not ids
            seen = counted_ids(sequence, session.tokenizer.id_of(prompts.image_text))
        return Processors(
            settled(rules, self._question.sampling),
            seen,
            sequence.length,
            prompts.eos,
            session.model.lm.config.vocab_size,
        )

    def _given(self, text: str) -> tuple[Token, bool]:
        """The answer that the question brings, as one token that is the last."""
        self._finish = "given"
        self._times_ms.append(self._clock.now_ms())
        return Token(self._ids[-1] if self._ids else -1, text, self._times_ms[-1]), True

    def _next(self, logits: Array, *, last: bool) -> tuple[Token, bool]:
        """The next token, and whether it is the last: by `last`, an end token or a stop string."""
        token = self._sample(self._processors.process(logits))
        self._processors.add(token)
        self._ids.append(token)
        self._times_ms.append(self._clock.now_ms())
        ended = token in self._session.model.prompts.eos
        text = "" if ended else self._text.push(token)
        last = last or ended or self._text.stopped
        if last:
            text += self._text.finish()
        if ended or self._text.stopped:
            self._finish = "stop"
        return Token(token, text, self._times_ms[-1]), last

    def read(self) -> tuple[PromptSequence, Tensor]:
        """The prompt's sequence and feature rows, for those who score it instead of iterating."""
        return self._read()

    def _read(self) -> tuple[PromptSequence, Tensor]:
        """Everything before the language model: the prompt's sequence and the feature rows."""
        prepared = self._prepared()
        features = self._session.encode(prepared.images, self._clock, tiles=prepared.tiles)
        return self._assembled(prepared, features), features.rows

    def _prepared(self) -> Prepared:
        """What needs no component: images decoded, the prompt rendered, cut into tokens."""
        session, question, clock = self._session, self._question, self._clock
        with clock.time("image_decode"):
            upright = session.model.images.upright
            images = [decode.load(source, upright=upright) for source in question.images]
        self._notes = tuple(
            f"image {number}: {note}"
            for number, image in enumerate(images, 1)
            for note in image.notes
        )
        rules = session.model.prompts
        self._notes += sampling_notes(session.model.generation, question.sampling)
        turns = [*question.history, question.prompt]
        tokenizer, template = session.tokenizer, question.template
        literal = tokenizer if question.literal else None
        rendered = prompts.render(rules, turns, question.images_by_turn, template, literal)
        if literal is None:
            self._notes += prompts.notes_on(rules, turns, template, tokenizer)
        if rendered.stop is not None:
            self._text.add_stop(rendered.stop)
        prompts.check_text_length(rules, tokenizer, rendered, session.engine.context)
        with clock.time("tokenize"):
            prompt = prompts.tokenize(rules, tokenizer, rendered)
            if question.answer is not None:
                whole = prompts.tokenize(rules, tokenizer, rendered.followed_by(question.answer))
                self._ids = list(whole.behind(prompt))
                prompt = whole
        if self._masks is not None:
            self._masks.images = images
        reused = rules.reuse_last and 0 < len(images) == prompt.images - 1
        prompts.check_slots(prompt, len(images) + reused)
        return Prepared(prompt, tuple(images), rendered.tiles, reused)

    def _assembled(self, prepared: Prepared, features: Features) -> PromptSequence:
        """The prompt with the tokens of its images. Raises InputError if it is too long."""
        rules = self._session.model.prompts
        indices = [*features.indices, *(features.indices[-1:] * prepared.reused)]
        sequence = prompts.assemble(prepared.prompt, indices)
        if rules.cut is not None and sequence.length > rules.cut:
            self._notes += (f"the prompt's {sequence.length} tokens were cut to {rules.cut}",)
            self._ids = self._ids[: rules.cut - sequence.length]  # of an answer that was given
            sequence = sequence.first(rules.cut)
        self._check_length(sequence)
        return sequence

    def _check_length(self, sequence: PromptSequence) -> None:
        context = self._session.engine.context
        if sequence.length == 0:
            raise InputError("the prompt is empty")
        if sequence.length > context:
            raise PromptTooLong(
                f"the prompt has {sequence.length} tokens ({sequence.image_tokens} of images), "
                f"the engine's context is {context}",
                hint="shorten the prompt, or build with a larger --max-context",
            )

    @property
    def answer(self) -> Answer:
        """The finished reply. Raises InputError before the last token was read."""
        if not self._done or self._sequence is None:
            raise InputError(
                "this reply has no answer: it was not read to its last token",
                hint="iterate over the reply first, or call session.answer(question)",
            )
        segments = None if self._masks is None else self._masks.made(self._clock)
        notes = () if self._masks is None else self._masks.notes
        stages = self._clock.totals_ms()
        behind = sum(ms for stage, ms in stages.items() if stage.startswith("segmenter."))
        first, last = self._times_ms[0], self._times_ms[-1]
        gaps = len(self._times_ms) - 1
        latency = (last - first) / gaps if gaps else 0.0
        stages |= {
            "time_to_first_token": first,
            "inter_token_latency": latency,
            "total": last + behind,
        }
        given = self._question.answer
        return Answer(
            self._text.text if given is None else given,
            tuple(self._ids),
            self._sequence.length - (0 if given is None else len(self._ids)),
            self._sequence.image_tokens,
            self._finish,
            {name: round(ms, 3) for name, ms in stages.items()},
            round(1000 * len(self._ids) / last, 3),
            round(1000 / latency, 3) if latency else 0.0,
            round(peak_rss_mb(), 1),
            (*self._notes, *notes),
            segments,
        )
