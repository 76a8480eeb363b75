"""The runtime: an engine opened once that answers many questions. No model-specific code, no torch.

The stages of a question: decode images, tokenize, preprocess, encoders, merger, prefill, then one
token per decode step. `Reply` streams it; `Answer` has its text and the time of every stage.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from edgevlm.engines import manifest
from edgevlm.engines.backends import LayerTime, Runner, RunnerOptions
from edgevlm.engines.backends.state import State
from edgevlm.engines.backends.tensors import Tensor
from edgevlm.engines.manifest import PREFILL_CHUNK, Engine
from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.components import open_components
from edgevlm.engines.runtime.concurrency import StatePool, Turns
from edgevlm.engines.runtime.finite import finite
from edgevlm.engines.runtime.question import Question as Question
from edgevlm.engines.runtime.reply import Answer as Answer
from edgevlm.engines.runtime.reply import Reply as Reply
from edgevlm.engines.runtime.reply import Token as Token
from edgevlm.engines.runtime.segmentation import Mask, Segmentation
from edgevlm.engines.runtime.two_forms import TwoForms
from edgevlm.engines.runtime.vision import Features, Vision, side_by_side
from edgevlm.toolkit.bundle.manifest import TOKENIZER
from edgevlm.toolkit.errors import BundleError, InputError
from edgevlm.toolkit.images.decode import LoadedImage
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import asked_threads, threads_here
from edgevlm.toolkit.text.prompts import PromptSequence
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.toolkit.vlm import towers
from edgevlm.toolkit.vlm.config import ModelConfig

REPLIES = 8  # the most that one session has open at once by default
_SCORED = 128  # positions whose logits are in memory at once


class Session:
    """An engine with its components loaded; a context manager that releases them.

    Several replies may be open at once, each with a KV state of its own, also in several threads:
    a component runs for one of them at a time, in turns. encodes_beside: whether encoders may run
    while the language model does: on a card, components share an arena.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        runners: dict[str, Runner],
        load_ms: float,
        *,
        together: bool = False,
        threads: int = 0,
        replies: int = REPLIES,
    ) -> None:
        self.folder = folder
        self.engine = engine
        self.model = engine.parsed_vlm()
        self.load_ms = load_ms
        rules = self.model.prompts
        self.tokenizer = Tokenizer.open(
            folder / TOKENIZER, rules.sentencepiece, self.model.lm.config.vocab_size
        )
        self.vision = Vision(self.model, engine, runners, together=together)
        self.segmentation = _segmentation(self.model, self.tokenizer, runners)
        self.threads = threads or threads_here()
        self._runners = runners
        self._lm = lm = runners[self.model.lm.name]
        self._tokens_form = lm.tokens if isinstance(lm, TwoForms) else lm
        self.states = StatePool(self._lm.new_state, replies, partial(_require_state, engine))
        self._turns, self._closed = Turns(), False
        self.encodes_beside = not engine.parsed_target().on_card
        self._seeing = Turns() if self.encodes_beside else self._turns
        # Every decode step takes feature rows too: a single one that no position refers to.
        width: int = self.model.lm.config.hidden_size
        self._no_features = np.zeros((1, width), np.float32)
        self._columns: dict[int, tuple[Array, Array]] = {}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        threads: int = 0,
        profile: bool = False,
        replies: int = REPLIES,
        verify: bool = False,
    ) -> Session:
        """Load an engine that can have `replies` replies open at once.

        Its files are compared with their checksums; with `verify`, by SHA-256.
        threads: 0 takes one for each processor; more than four times as many are refused. If
        one component cannot be opened, the others are closed. Raises BundleError, TargetMismatch,
        MissingExtra, OutOfMemory, BuildError or InputError.
        """
        cores = asked_threads(threads)
        if replies < 1:
            raise InputError(f"a session with {replies} replies answers nothing")
        started, folder = time.perf_counter(), Path(folder)
        engine = manifest.read(folder)
        model = towers.vlm(engine.parsed_model(), str(folder))
        manifest.check(folder, engine)
        if verify:
            manifest.examine(folder, engine)
        manifest.check_verified(folder, engine)
        memory.require(memory.of_engine(engine), f"opening {folder}", engine.parsed_target())
        encoders = len(model.encoders)
        card = engine.parsed_target().of_tensorrt
        together = side_by_side(encoders, cores, on_card=card) and not (card and profile)
        share = cores // encoders if together else threads
        plugins = engine.plugins
        shared = RunnerOptions(engine.context, share, profile, beside=together, plugins=plugins)
        alone = RunnerOptions(engine.context, threads, profile, plugins=plugins)
        options = {
            record.name: shared if record.name.startswith("encoder.") else alone
            for record in engine.components
        }
        with ExitStack() as opened:
            runners = open_components(folder, engine, options, cores, opened)
            load_ms = 1000 * (time.perf_counter() - started)
            session = cls(
                folder,
                engine,
                runners,
                load_ms,
                together=together,
                threads=threads,
                replies=replies,
            )
            opened.pop_all()
        return session

    def ask(self, question: Question) -> Reply:
        """Start a reply; iterate over it for tokens, then read its `answer`.

        Raises InputError or ConfigError for a question that cannot be answered as it is.
        """
        self._check_open()
        return Reply(self, question)

    def answer(self, question: Question) -> Answer:
        """The whole reply at once."""
        reply = self.ask(question)
        for _ in reply:
            pass
        return reply.answer

    # -- the stages ------------------------------------------------------------------------

    def new_state(self, slots: int = 1) -> State:
        """An empty KV state for `slots` sequences."""
        self._check_open()
        return self._lm.new_state(slots)

    def encode(
        self,
        images: Sequence[LoadedImage],
        clock: Clock,
        *,
        tiles: bool = True,
        count: int | None = None,
    ) -> Features:
        """Features of all images; see Vision.encode."""
        if not images:  # without waiting for the images of others
            self._check_open()
            return self.vision.encode((), clock)
        with self._seeing:
            self._check_open()
            return self.vision.encode(images, clock, tiles=tiles, count=count)

    def prefill(self, sequence: PromptSequence, features: Tensor, state: State) -> Array:
        """Logits [vocab] after the whole prompt, which the state, one slot, then holds. Raises
        AccuracyError if they are no numbers.

        The prompt is read in equal chunks of at most PREFILL_CHUNK tokens: less memory, and less
        time, as attention computes a square of scores per chunk, of which the causal half counts.
        """
        chunks = -(-sequence.length // PREFILL_CHUNK)
        cuts = [sequence.length * i // chunks for i in range(chunks + 1)]
        for begin, end in pairwise(cuts):
            scored = int(end == sequence.length)
            piece = sequence.between(begin, end)
            logits = self.read_piece(piece, begin, features, state, scored)
        return np.asarray(logits[0])

    def read_piece(
        self, piece: PromptSequence, start: int, features: Tensor, state: State, scored: int
    ) -> Array:
        """Read several tokens into a state of one slot, which holds `start` others before them.

        Returns logits [scored, vocab] of the last `scored` ones, valid until the next call. A piece
        of which all is scored is read in the form for tokens. Raises AccuracyError if logits are no
        numbers.
        """
        length = piece.length
        lm = self._tokens_form if scored == length else self._lm
        inputs = {
            "ids": piece.ids,
            "rows": piece.rows,
            "features": features,
            "start": np.asarray([start], np.int64),
            "score": np.arange(length - scored, length, dtype=np.int64)[None],
        }
        with self._turns:
            self._check_open()
            logits = np.asarray(lm.run(inputs, state)["logits"][0])
        return finite(self.model.lm.name, "logits", logits)

    def decode(self, token: int, position: int, state: State) -> Array:
        """Logits [vocab] after one more token at `position` in a state of one slot.

        They are valid until the next call with this state.
        """
        return np.asarray(self.decode_batch([token], [position], state)[0])

    def decode_batch(self, tokens: Sequence[int], positions: Sequence[int], state: State) -> Array:
        """Logits [slots, vocab] after one more token in every slot, each at its own position."""
        column = (len(tokens), 1)
        no_rows, score = self._columns.get(len(tokens)) or self._column(len(tokens))
        inputs: dict[str, Array] = {
            "ids": np.asarray(tokens, np.int64).reshape(column),
            "rows": no_rows,
            "features": self._no_features,
            "start": np.asarray(positions, np.int64),
            "score": score,
        }
        with self._turns:
            self._check_open()
            logits = np.asarray(self._lm.run(inputs, state)["logits"][:, 0])
        return finite(self.model.lm.name, "logits", logits)

    def score(self, sequence: PromptSequence, features: Tensor, state: State) -> Iterator[Array]:
        """Logits [positions, vocab] after every position of a prompt, in pieces, in order.

        The state, one slot, holds the prompt in the end. A piece is valid until the next one.
        """
        for begin in range(0, sequence.length, _SCORED):
            end = min(begin + _SCORED, sequence.length)
            inputs = {
                "ids": sequence.ids[:, begin:end],
                "rows": sequence.rows[:, begin:end],
                "features": features,
                "start": np.asarray([begin], np.int64),
                "score": np.arange(end - begin)[None],
            }
            with self._turns:
                self._check_open()
                outputs = self._lm.run(inputs, state)
            yield np.asarray(outputs["logits"][0])

    def state_at(self, token: int, position: int, state: State) -> Array:
        """The language model's state [hidden_size] at a token that `state` holds at `position`."""
        no_rows, score = self._columns.get(1) or self._column(1)
        inputs: dict[str, Array] = {
            "ids": np.asarray([[token]], np.int64),
            "rows": no_rows,
            "features": self._no_features,
            "start": np.asarray([position], np.int64),
            "score": score,
        }
        with self._turns:
            self._check_open()
            return np.array(self._lm.run(inputs, state)["hidden"][0, 0])

    def masks(
        self, states: Sequence[Array], images: Sequence[LoadedImage], clock: Clock
    ) -> tuple[Mask, ...]:
        """See Segmentation.masks."""
        assert self.segmentation is not None
        with self._turns:
            self._check_open()
            return self.segmentation.masks(states, images, clock)

    def _column(self, slots: int) -> tuple[Array, Array]:
        """For each slot: no feature row, and the only position to score."""
        column = np.full((slots, 1), -1, np.int64), np.zeros((slots, 1), np.int64)
        self._columns[slots] = column
        return column

    def layers(self) -> dict[str, list[LayerTime]]:
        """Time per node of every component; for a session opened with profile=True."""
        with self._turns:
            self._check_open()
            return {name: runner.layers() for name, runner in self._runners.items()}

    # -- the end ---------------------------------------------------------------------------

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release all components and states; open replies end with an InputError."""
        with ExitStack() as nobody_else:
            for turns in {self._turns, self._seeing}:
                nobody_else.enter_context(turns)
            if self._closed:
                return
            self._closed = True
            with ExitStack() as stack:  # each is closed, even if closing another fails
                stack.callback(self.states.clear)
                stack.callback(self.vision.close)
                for runner in self._runners.values():
                    stack.callback(runner.close)

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("the session is closed", hint=f"open {self.folder} again")


def _segmentation(
    model: ModelConfig, tokenizer: Tokenizer, runners: Mapping[str, Runner]
) -> Segmentation | None:
    """What makes masks. Raises BundleError if the tokenizer lacks the token that stands for one."""
    if model.segmenter is None:
        return None
    token = tokenizer.id_of(model.segmenter.token)
    if token is None:
        raise BundleError(
            f"{TOKENIZER} does not know {model.segmenter.token}", hint="export the model again"
        )
    return Segmentation(model.segmenter, token, runners)


def _require_state(engine: Engine, held: int) -> None:
    """Opening the engine counted one state; each further one must fit into the free memory."""
    if held:
        needed = replace(memory.of_engine(engine), weights_bytes=0, activations_bytes=0)
        memory.require(needed, f"the KV cache of reply {held + 1}", engine.parsed_target())
