"""The runtime: an engine opened once, asked many times. No model-specific code, no torch.

A question goes: decode images, tokenize, preprocess, encoders, merger, prefill, then one token
per decode step. `Reply` streams it; `Answer` is what was said and where each millisecond went.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from edgevlm.engines import backends, manifest
from edgevlm.engines.backends import LayerTime, Runner, RunnerOptions
from edgevlm.engines.manifest import PREFILL_CHUNK, Engine
from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.memory import peak_rss_mb
from edgevlm.engines.runtime.sampling import Sampling, sampler
from edgevlm.engines.runtime.vision import Vision, side_by_side
from edgevlm.toolkit.bundle.manifest import TOKENIZER
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.images import preprocess
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import threads_here
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.text.prompts import PromptSequence
from edgevlm.toolkit.text.tokenizer import TextStream, Tokenizer

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Question:
    """One request. images: file paths or encoded bytes; template as in prompts.render.

    history: earlier turns of the conversation, user and assistant alternating.
    """

    prompt: str
    images: Sequence[str | Path | bytes] = ()
    max_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    template: str = "auto"
    stop: Sequence[str] = ()
    history: Sequence[str] = ()


@dataclass(frozen=True)
class Token:
    """One generated token: the text that became certain with it, and when (ms after asking)."""

    id: int
    text: str
    ms: float


@dataclass(frozen=True)
class Answer:
    """A finished reply. timings_ms: stages by name; notes: what was done to the images."""

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


class Session:
    """An engine with its components loaded."""

    def __init__(
        self,
        folder: Path,
        made: Engine,
        runners: dict[str, Runner],
        load_ms: float,
        *,
        together: bool = False,
    ) -> None:
        self.folder = folder
        self.engine = made
        self.model = made.parsed_model()
        self.load_ms = load_ms
        self._runners = runners
        self.vision = Vision(self.model, made, runners, together=together)
        rules = self.model.prompts
        self.tokenizer = Tokenizer.open(folder / TOKENIZER, doubled_blank=rules.doubled_blank)

    @classmethod
    def open(cls, folder: str | Path, *, threads: int = 0, profile: bool = False) -> Session:
        """Load an engine. Raises BundleError, TargetMismatch, MissingExtra or BuildError."""
        if threads < 0:
            raise InputError(f"--threads {threads} is negative", hint="0 takes all there are")
        started, folder = time.perf_counter(), Path(folder)
        made = manifest.read(folder)
        manifest.check(folder, made)
        memory.require(memory.of_engine(made), f"opening {folder}")
        backend = backends.backend(made.parsed_target())
        encoders, cores = len(made.parsed_model().encoders), threads or threads_here()
        together = side_by_side(encoders, cores)
        shared = RunnerOptions(made.context, cores // encoders if together else threads, profile)
        alone = RunnerOptions(made.context, threads, profile)
        runners = {
            r.name: backend.open(
                folder, r, made.model, shared if r.name.startswith("encoder.") else alone
            )
            for r in made.components
        }
        load_ms = 1000 * (time.perf_counter() - started)
        return cls(folder, made, runners, load_ms, together=together)

    def ask(self, question: Question) -> Reply:
        """Start a reply; iterate over it for tokens, then read its `answer`."""
        return Reply(self, question)

    def answer(self, question: Question) -> Answer:
        """The whole reply at once."""
        reply = self.ask(question)
        for _ in reply:
            pass
        return reply.answer

    # -- the stages ------------------------------------------------------------------------

    def prefill(self, layout: PromptSequence, features: Array) -> Array:
        """Logits [vocab] after the whole prompt; the cache then holds it.

        The prompt is read in equal chunks of at most PREFILL_CHUNK tokens: less memory, and less
        time, as attention computes a square of scores per chunk, of which the causal half counts.
        """
        pieces = -(-layout.length // PREFILL_CHUNK)
        cuts = [layout.length * i // pieces for i in range(pieces + 1)]
        for begin, end in pairwise(cuts):
            last = end == layout.length
            inputs = {
                "ids": layout.ids[:, begin:end],
                "rows": layout.rows[:, begin:end],
                "features": features,
                "start": np.asarray([begin], np.int64),
                "score": np.full((1, 1 if last else 0), end - begin - 1, np.int64),
            }
            outputs = self._runners[self.model.lm.name].run(inputs)
        return np.asarray(outputs["logits"][0, 0])

    def decode(self, token: int, position: int, features: Array) -> Array:
        """Logits [vocab] after one more token at `position`."""
        inputs = {
            "ids": np.asarray([[token]], np.int64),
            "rows": np.asarray([[-1]], np.int64),
            "features": features,
            "start": np.asarray([position], np.int64),
            "score": np.zeros((1, 1), np.int64),
        }
        return np.asarray(self._runners[self.model.lm.name].run(inputs)["logits"][0, 0])

    def layers(self) -> dict[str, list[LayerTime]]:
        """Time per node of every component; for a session opened with profile=True."""
        return {name: runner.layers() for name, runner in self._runners.items()}

    def close(self) -> None:
        """Release all components."""
        for runner in self._runners.values():
            runner.close()


class Reply:
    """A reply in the making: an iterator of tokens that knows its timings."""

    def __init__(self, session: Session, question: Question) -> None:
        self._session = session
        self._question = question
        self._clock = Clock()
        self._sample = sampler(question.sampling)
        self._ids: list[int] = []
        self._times_ms: list[float] = []
        self._text = StoppingText(session.tokenizer, question.stop)
        self._finish: Finish = "length"
        self._notes: tuple[str, ...] = ()
        if question.max_tokens < 1:
            raise InputError(f"--max-tokens {question.max_tokens} is less than 1")

    def __iter__(self) -> Iterator[Token]:
        layout, features = self._read()
        self._layout = layout
        with self._clock.time("prefill"):
            logits = self._session.prefill(layout, features)
        nothing = np.zeros((1, features.shape[1]), np.float32)
        room = self._session.engine.context - layout.length
        for step in range(min(self._question.max_tokens, room + 1)):
            if step:
                logits = self._session.decode(self._ids[-1], layout.length + step - 1, nothing)
            token = self._sample(logits)
            self._ids.append(token)
            self._times_ms.append(self._clock.now_ms())
            ended = token in self._session.model.prompts.eos
            text = self._text.finish() if ended else self._text.push(token)
            yield Token(token, text, self._times_ms[-1])
            if ended or self._text.stopped:
                self._finish = "stop"
                break
        rest = self._text.finish()
        if rest:
            yield Token(-1, rest, self._clock.now_ms())

    def _read(self) -> tuple[PromptSequence, Array]:
        """Everything before the language model."""
        session, question, clock = self._session, self._question, self._clock
        with clock.time("image_decode"):
            upright = session.model.images.upright
            images = [preprocess.load(source, upright=upright) for source in question.images]
        self._notes = tuple(
            f"image {number}: {note}"
            for number, image in enumerate(images, 1)
            for note in image.notes
        )
        rules = session.model.prompts
        turns = [*question.history, question.prompt]
        rendered = prompts.render(rules, turns, len(images), question.template)
        if rendered.stop is not None:
            self._text.add_stop(rendered.stop)
        with clock.time("tokenize"):
            prompt = prompts.tokenize(rules, session.tokenizer, rendered.text)
        again = rules.reuse_last and 0 < len(images) == prompt.images - 1
        prompts.check_slots(prompt, len(images) + again)
        features = session.vision.encode(images, clock, tiles=rendered.tiles)
        layout = prompts.assemble(prompt, [*features.places, *(features.places[-1:] * again)])
        if rules.cut is not None and layout.length > rules.cut:
            self._notes += (f"the prompt's {layout.length} tokens were cut to {rules.cut}",)
            layout = layout.first(rules.cut)
        self._check_length(layout)
        return layout, features.rows

    def _check_length(self, layout: PromptSequence) -> None:
        context = self._session.engine.context
        if layout.length == 0:
            raise InputError("the prompt is empty")
        if layout.length > context:
            raise InputError(
                f"the prompt has {layout.length} tokens ({layout.image_tokens} of images), "
                f"the engine's context is {context}",
                hint="shorten the prompt, or build with a larger --max-context",
            )

    @property
    def answer(self) -> Answer:
        """The finished reply; iterate first."""
        stages = self._clock.totals_ms()
        first, last = self._times_ms[0], self._times_ms[-1]
        gaps = len(self._times_ms) - 1
        latency = (last - first) / gaps if gaps else 0.0
        stages |= {
            "time_to_first_token": first,
            "inter_token_latency": latency,
            "total": last,
        }
        return Answer(
            self._text.said,
            tuple(self._ids),
            self._layout.length,
            self._layout.image_tokens,
            self._finish,
            {name: round(ms, 3) for name, ms in stages.items()},
            round(1000 * len(self._ids) / last, 3),
            round(1000 / latency, 3) if latency else 0.0,
            round(peak_rss_mb(), 1),
            self._notes,
        )


class StoppingText:
    """Streams text and ends it before a stop string; holds back what may become one."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer)
        self._stops = [s for s in stop if s]
        self._held = ""
        self.said = ""
        self.stopped = False

    def add_stop(self, stop: str) -> None:
        """One more stop string (the template's)."""
        self._stops += [stop] if stop else []

    def push(self, token: int) -> str:
        """The text that is certain to belong to the answer after this token."""
        return self._release(self._stream.push(token), final=False)

    def finish(self) -> str:
        """What was held back; nothing after a stop string."""
        return self._release(self._stream.finish(), final=True)

    def _release(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [(text.find(s) + len(s), text.find(s)) for s in self._stops if s in text]
        if found:  # the one that is complete first, however the text came in tokens
            self.stopped, self._held, out = True, "", text[: min(found)[1]]
        else:
            keep = 0 if final else max((_overlap(text, s) for s in self._stops), default=0)
            self._held, out = text[len(text) - keep :], text[: len(text) - keep]
        self.said += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
