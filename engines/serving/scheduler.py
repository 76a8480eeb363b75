"""Many answers at once on one session: prompts are read one at a time, in pieces, and between the
pieces all answers that have begun get one more token, in one batch.

The work is done in a thread of the scheduler's own; on a processor, images are encoded in another
one beside it. An answer does not depend on what else is
answered, to the last bit: kernels take rows two or four at a time and round a row that is left over
in another way, so batches are filled up to a number of rows for which that does not happen
(rows.py), and prompts are cut on a grid. Session.answer, which decodes one row, may therefore round
otherwise; `strict` makes its very calls instead, one answer after the other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Thread

import numpy as np

from edgevlm.engines.manifest import PREFILL_CHUNK
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.session import Session
from edgevlm.engines.serving.encoding import Encoding
from edgevlm.engines.serving.image_cache import ImageCache
from edgevlm.engines.serving.job import Failed, Job
from edgevlm.engines.serving.limits import Busy, Limits, late
from edgevlm.engines.serving.rows import rows_together
from edgevlm.engines.serving.slots import GRID, Slots, require_memory
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.prompts import PromptSequence

PIECE_BESIDE_ANSWERS = 4 * GRID  # tokens of a prompt between two tokens of the others


@dataclass
class Counts:
    """What was done since the start. steps: calls that gave one token to each of `stepped` answers
    in all; guessed, right: tokens that were looked up.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    stepped: int = 0
    guessed: int = 0
    right: int = 0
    cancelled: int = 0
    failed: int = 0
    answered: int = 0


class Scheduler:
    """Answers jobs, up to `limits.slots` at once; as many as `limits.queue` wait.

    strict: each answer is computed with the very calls that `Session.answer` makes. speculate:
    whether an answer that is alone guesses tokens from its text; where kernels round a row by what
    is beside it, its tokens may then differ.
    """

    def __init__(
        self, session: Session, limits: Limits, *, strict: bool = False, speculate: bool = False
    ) -> None:
        if strict and speculate:
            raise ConfigError("--strict and --speculate exclude each other")
        self.session, self.limits, self.strict = session, limits.check(), strict
        self.speculate = speculate
        require_memory(session, limits)
        self.together, state = rows_together(session, limits.slots, strict=strict)
        self.slots = Slots(state, limits.slots)
        self.images = ImageCache(session, limits.image_cache_bytes)
        self.counts = Counts()
        self._no_rows = session.encode((), Clock()).rows
        self._changed = Condition()
        self._encoding = Encoding(self.images, self._notify)
        self._waiting: deque[Job] = deque()
        self._begun: list[Job] = []  # have left the queue, and have not ended
        self._reading: Job | None = None
        self._answering: list[Job] = []  # where slots are movable, job i is in slot i
        self._complete: list[Job] = []  # they have left; whoever is told finds all counted
        self._end = float("inf")  # when answers are ended, as the server stops
        self._thread = Thread(target=self._work, name="edgevlm-scheduler", daemon=True)
        self._thread.start()

    # -- called by other threads -----------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Put a prepared job into the queue. Raises Busy."""
        with self._changed:
            if self._closing:
                raise Busy("the server is stopping", hint="ask again when it has started")
            if len(self._waiting) >= self.limits.queue + self._idle():
                raise Busy(
                    f"{len(self._waiting)} requests are waiting already",
                    hint="ask again later",
                )
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Stop a job before its next token; it reports none but one that is being computed."""
        job.cancelled = True
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Jobs that have a slot, or will have one when their images are encoded."""
        return len(self._begun)

    def close(self, grace_s: float = 0.0) -> None:
        """Take no more jobs, give those there are `grace_s` seconds, and end the thread."""
        with self._changed:
            self._end = time.monotonic() + max(grace_s, 0.0)
            self._changed.notify()
        self._thread.join()
        self._encoding.close()

    @property
    def _closing(self) -> bool:
        return self._end < float("inf")

    def _idle(self) -> int:
        return self.limits.slots - self.active

    def _jobs_with_slots(self) -> list[Job]:
        return [*([self._reading] if self._reading else []), *self._answering]

    # -- the thread ------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._due():
                    if self._closing and not self._begun and not self._waiting:
                        return
                    self._changed.wait()
            self._drop()
            self._read_prompts()
            if self._answering:
                self._guarded(self._step, list(self._answering))

    def _due(self) -> bool:
        """Whether there is anything to do but wait for an image that is being encoded."""
        begun = self._answering or self._reading or self._encoding.ready
        return bool(begun) or self._startable() is not None

    def _startable(self) -> Job | None:
        """The first waiting job that can begin, if there is a slot for it; while a job's images
        are encoded, the first without images.
        """
        if self._reading is not None or not self._idle():
            return None
        busy = self._encoding.job is not None
        return next((job for job in self._waiting if not (busy and job.has_images)), None)

    def _next(self) -> Job | None:
        """The job that begins now, taken out of the queue. Whoever counts those that wait and then
        the active ones counts it.
        """
        with self._changed:
            job = self._startable()
            if job is not None:
                self._begun.append(job)
                self._waiting.remove(job)
            return job

    def _read_prompts(self) -> None:
        """Read a piece of a prompt, or several prompts with little new; where images are not
        encoded beside, encode one at most.
        """
        left, encoded = self._most(), self.images.misses
        beside = self.session.encodes_beside
        while left > 0 and (beside or self.images.misses == encoded):
            if self._reading is None:
                self._begin_next()
            job = self._reading
            if job is None:
                return
            before = job.held
            self._guarded(self._read_piece, [job])
            left -= max(job.held - before, 1)

    def _most(self) -> int:
        """Tokens of prompts to read before the next step of the answers."""
        return PIECE_BESIDE_ANSWERS if self._answering else PREFILL_CHUNK

    def _drop(self) -> None:
        """End the jobs whose client has gone, and those that took too long."""
        with self._changed:
            jobs = [*self._waiting, *self._jobs_with_slots()]
        for job in jobs:
            if job.cancelled:
                self.counts.cancelled += 1
                self._remove(job)
            elif over := late(job.deadline, self._end, self.limits):
                self._fail(job, over)

    def _fail(self, job: Job, error: Exception, *, trusted: bool = True) -> None:
        """trusted: whether what the job's slot holds is what it should be."""
        self.counts.failed += 1
        self._remove(job, keep=trusted)
        job.sink(Failed(error))

    def _guarded(self, work: Callable[[], None], jobs: list[Job]) -> None:
        """Do `work`; if it fails, its jobs fail, and what their slots hold is forgotten."""
        try:
            work()
        except Exception as odd:
            for job in jobs:
                if job is self._reading or job in self._answering:
                    self._fail(job, odd, trusted=False)
        while self._complete:
            self._complete.pop(0).end()

    def _begin_next(self) -> None:
        """Give a slot to a job whose images are encoded, or else to the next one that waits."""
        while self._reading is None:
            if self._encoding.ready:
                job, failure = self._encoding.taken()
                if job.cancelled:
                    self.counts.cancelled += 1
                    self._begun.remove(job)
                else:
                    self._begin(job, failure or late(job.deadline, self._end, self.limits))
                continue
            waiting = self._next()
            if waiting is None:
                return
            if waiting.has_images and self.session.encodes_beside:
                self._encoding.start(waiting)
                continue
            try:
                waiting.place(self.images)
            except Exception as odd:
                self._begin(waiting, odd)
            else:
                self._begin(waiting, None)

    def _begin(self, job: Job, failure: Exception | None) -> None:
        """Give a slot to a job whose images are encoded; failure: why it gets none."""
        if failure is not None:
            self.counts.failed += 1
            self._begun.remove(job)
            job.sink(Failed(failure))
            return
        job.slot, job.held = self.slots.take(job.key, reuse=not self.strict)
        job.reused = job.held
        self.counts.prompt_tokens += job.sequence.length
        self.counts.reused_tokens += job.reused
        self._reading = job

    def _read_piece(self) -> None:
        """Read some of the prompt; after the last of it the first token is chosen."""
        job = self._reading
        assert job is not None
        since, length = job.now_ms(), job.sequence.length
        end = min(job.held + self._piece(job), length)
        scored = int(end == length)
        piece = job.sequence.between(job.held, end)
        state = self.slots.state.slot(job.slot)
        features = job.features if piece.image_tokens else self._no_rows
        logits = self.session.read_piece(piece, job.held, features, state, scored)
        job.held = end
        job.reading(since)
        self.slots.hold(job.slot, job.reusable())
        if scored:
            self._join(job)
            self._give([job], logits)

    def _piece(self, job: Job) -> int:
        """Tokens to read next; with `strict` the cuts are those of Session.prefill.

        The last piece has two tokens at least, as one alone has kernels of its own.
        """
        length = job.sequence.length
        if self.strict:
            chunks = -(-length // PREFILL_CHUNK)
            ends = [length * i // chunks for i in range(chunks + 1)]
            return next(end for end in ends if end > job.held) - job.held
        size = self._most()
        return size - GRID if length - job.held - size == 1 else size

    def _join(self, job: Job) -> None:
        """A job whose prompt was read is answered from now on."""
        if self.slots.movable:
            self._move(job.slot, len(self._answering))
        self._reading = None
        self._answering.append(job)

    def _move(self, slot: int, to: int) -> None:
        """Exchange slots with the jobs that are there."""
        if slot == to:
            return
        there = [job for job in self._jobs_with_slots() if job.slot in (slot, to)]
        filled = [job.filled for job in there]
        self.slots.swap(slot, to, max([*filled, self.slots.held(slot), self.slots.held(to)]))
        for job in there:
            job.slot = to if job.slot == slot else slot

    def _step(self) -> None:
        """One more token for every answer."""
        jobs, state = list(self._answering), self.slots.state
        if len(jobs) == 1 and self.speculate and (guessed := jobs[0].guessed()):
            self._try(jobs[0], guessed)
            return
        if self.slots.movable and not self.strict:
            self._give(jobs, self._batch(jobs))
        else:
            for job in jobs:
                slot = state.slot(job.slot)
                self._give([job], self.session.decode(job.last, job.position, slot)[None])
        self.counts.steps += 1
        self.counts.stepped += len(jobs)

    def _batch(self, jobs: list[Job]) -> Array:
        """Logits of all answers, and behind them those of rows that fill up the batch.

        Such a row writes into a slot that nobody decodes, behind what it holds.
        """
        tokens, positions = [job.last for job in jobs], [job.position for job in jobs]
        for slot in range(len(jobs), -(-len(jobs) // self.together) * self.together):
            reading = self._reading if self._reading and self._reading.slot == slot else None
            end = reading.filled if reading else self.slots.held(slot)
            if end >= self.session.engine.context:  # full: its last position is given up
                end -= 1
                self.slots.shorten(slot, end)
            tokens.append(0)
            positions.append(end)
        return self.session.decode_batch(tokens, positions, self.slots.state.slots(0, len(tokens)))

    def _try(self, job: Job, guessed: list[int]) -> None:
        """Read the last token and those guessed in one call, and keep what would be chosen."""
        ids = np.asarray([[job.last, *guessed]], np.int64)
        piece = PromptSequence(ids, np.full_like(ids, -1))
        state = self.slots.state.slot(job.slot)
        logits = self.session.read_piece(piece, job.position, self._no_rows, state, piece.length)
        right = 0
        for row, expected in zip(logits, [*guessed, -1], strict=True):
            self._give([job], row[None])
            if job not in self._answering or job.last != expected:
                break
            right += 1
        job.were_right(right, len(guessed))
        self.counts.guessed += len(guessed)
        self.counts.right += right

    def _give(self, jobs: list[Job], logits: Array) -> None:
        """Choose the next token of each job; those that are complete, or cannot go on, leave.

        They leave when all have chosen: slots move then, and must hold what was just computed.
        """
        leaving = list[tuple[Job, Exception | None]]()
        for job, row in zip(jobs, logits, strict=False):  # behind them may be rows that filled up
            try:
                ended = job.choose(row)
                self.counts.output_tokens += 1
            except Exception as odd:
                leaving.append((job, odd))
                continue
            if ended:
                leaving.append((job, None))
        for job, failure in leaving:
            if failure is None:
                self.counts.answered += 1
                self._remove(job)
                self._complete.append(job)
            else:
                self._fail(job, failure, trusted=False)

    def _remove(self, job: Job, *, keep: bool = True) -> None:
        """Take a job out, wherever it is; the last of the answers moves into its slot."""
        if job in self._waiting:
            with self._changed:
                self._waiting.remove(job)
        if job not in self._jobs_with_slots():
            return
        self._begun.remove(job)
        self.slots.hold(job.slot, job.reusable() if keep else job.key[:0])
        self.slots.release(job.slot)
        if job is self._reading:
            self._reading = None
            return
        self._answering.remove(job)
        count = len(self._answering)
        if self.slots.movable and job.slot != count:
            self._move(count, job.slot)
            self._answering.sort(key=lambda other: other.slot)
