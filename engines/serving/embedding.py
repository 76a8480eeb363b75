"""Embeddings for many who ask at once: images of several requests in one batch of a tower.

The work is done in a thread of its own. An embedding does not depend on what else is asked, to the
last bit: images are computed together only in numbers for which the tower gives the bits that it
gives each of them alone, which is tried when the queue is made.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Condition, Thread
from typing import TypeAlias

import numpy as np

from edgevlm.engines.runtime.clock import Clock, Span
from edgevlm.engines.runtime.embedding import Embedder
from edgevlm.engines.serving.job import Failed
from edgevlm.engines.serving.limits import Busy, Limits, late
from edgevlm.toolkit.errors import AccuracyError, InputError
from edgevlm.toolkit.images.decode import ImageSource
from edgevlm.toolkit.ops.vocabulary import Array


@dataclass(frozen=True)
class Computed:
    """All embeddings of a request, float32 [images, channels], as the tower gives them."""

    vectors: Array
    timings_ms: dict[str, float]


EmbeddingEvent: TypeAlias = "Computed | Failed"


@dataclass
class Counts:
    """What was done since the start: embeddings, calls of the tower, and how requests ended."""

    images: int = 0
    batches: int = 0
    cancelled: int = 0
    failed: int = 0
    answered: int = 0


class EmbeddingJob:
    """The images of one request. sink: is called once, in the queue's thread; it must not wait."""

    def __init__(
        self,
        tower: Embedder,
        images: Sequence[ImageSource],
        sink: Callable[[EmbeddingEvent], None],
        *,
        seconds: float = float("inf"),
    ) -> None:
        self.sink = sink
        self.deadline = time.monotonic() + seconds
        self.cancelled = self.over = False
        self.pixels: list[Array] = []
        self._tower, self._images, self._clock = tower, images, Clock()
        self._vectors = dict[int, Array]()
        self._prepared_ms = 0.0
        self._event: EmbeddingEvent | None = None

    def prepare(self) -> EmbeddingJob:
        """Decode and preprocess: in the caller's thread, before the job waits. Raises InputError
        that says which image cannot be read.
        """
        with self._clock.time("preprocess"):
            for number, image in enumerate(self._images, 1):
                try:
                    self.pixels.append(self._tower.pixels(image))
                except InputError as odd:
                    raise InputError(f"image {number}: {odd.message}", hint=odd.hint) from None
        self._prepared_ms = self._clock.now_ms()
        return self

    def begun(self) -> float:
        """The job's time in ms when a batch begins; of the first one, it has waited until then."""
        now = self._clock.now_ms()
        if not any(span.stage == "queue" for span in self._clock.spans):
            waited = now - self._prepared_ms
            self._clock.spans.append(Span("queue", self._prepared_ms, waited))
        return now

    def computed(self, found: dict[int, Array], begun_ms: float) -> bool:
        """Take embeddings by the numbers of their images; whether these were the last, which `end`
        tells.

        begun_ms: when their batch began. Raises AccuracyError for values that are no numbers.
        """
        self._clock.spans.append(Span("encoder", begun_ms, self._clock.now_ms() - begun_ms))
        for number, vector in found.items():
            if not np.isfinite(vector).all():
                raise AccuracyError(f"image {number + 1} gives values that are no numbers")
        self._vectors |= found
        self.over = len(self._vectors) == len(self.pixels)
        if self.over:
            rows = np.stack([self._vectors[number] for number in range(len(self.pixels))])
            times = self._clock.totals_ms() | {"total": self._clock.now_ms()}
            self._event = Computed(rows, {name: round(ms, 3) for name, ms in times.items()})
        return self.over

    def failed(self, error: Exception) -> None:
        """There will be no embeddings, which `end` tells."""
        self.over = True
        self._event = Failed(error)

    def end(self) -> None:
        """Report how the job ended, if it has: when it was counted."""
        if self._event is not None:
            self.sink(self._event)
            self._event = None


class EmbeddingQueue:
    """Computes jobs in batches of up to `tower.batch` images; `limits.queue` more may wait."""

    def __init__(self, tower: Embedder, limits: Limits) -> None:
        self.tower, self.limits = tower, limits.check()
        self.sizes = sizes_alike(tower)
        self.counts = Counts()
        self.active = 0
        self._changed = Condition()
        self._waiting: deque[tuple[EmbeddingJob, int]] = deque()
        self._end = float("inf")  # when requests are ended, as the server stops
        self._thread = Thread(target=self._work, name="edgevlm-embeddings", daemon=True)
        self._thread.start()

    # -- called by other threads -----------------------------------------------------------

    def submit(self, job: EmbeddingJob) -> None:
        """Put a prepared job into the queue, which takes any while it is empty. Raises Busy."""
        with self._changed:
            if self._closing:
                raise Busy("the server is stopping", hint="ask again when it has started")
            waiting = len(self._waiting)
            if waiting and waiting + len(job.pixels) > self.limits.queue:
                raise Busy(f"{waiting} images are waiting already", hint="ask again later")
            self._waiting.extend((job, number) for number in range(len(job.pixels)))
            self._changed.notify()

    def cancel(self, job: EmbeddingJob) -> None:
        """Compute no more of a job; it reports nothing unless its last images are at work."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._waiting)

    def close(self, grace_s: float = 0.0) -> None:
        """Take no more jobs, give those there are `grace_s` seconds, and end the thread."""
        with self._changed:
            self._end = time.monotonic() + max(grace_s, 0.0)
            self._changed.notify()
        self._thread.join()

    @property
    def _closing(self) -> bool:
        return self._end < float("inf")

    # -- the thread ------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._drop()
                while not self._waiting:
                    if self._closing:
                        return
                    self._changed.wait()
                    self._drop()
                most = max(size for size in self.sizes if size <= len(self._waiting))
                self.active = most  # first: who counts those that wait, then these, misses none
                group = [self._waiting.popleft() for _ in range(most)]
            jobs = list(dict.fromkeys(job for job, _ in group))
            self._compute(jobs, group)
            self.active = 0
            for job in jobs:
                job.end()

    def _drop(self) -> None:
        """Take out the images of jobs that are over, whose client has gone, or that are late."""
        for job, _ in self._waiting:
            if job.cancelled and not job.over:
                job.over = True
                self.counts.cancelled += 1
            elif not job.over and (over := late(job.deadline, self._end, self.limits)):
                self._fail(job, over)
                job.end()
        self._waiting = deque(item for item in self._waiting if not item[0].over)

    def _compute(self, jobs: list[EmbeddingJob], group: list[tuple[EmbeddingJob, int]]) -> None:
        begun = {job: job.begun() for job in jobs}
        try:
            vectors = self.tower.run(np.stack([job.pixels[number] for job, number in group]))
        except Exception as odd:
            for job in jobs:
                self._fail(job, odd)
            return
        self.counts.images += len(group)
        self.counts.batches += 1
        rows = list(zip(group, vectors, strict=True))
        for job in jobs:
            own = {number: vector for (asked, number), vector in rows if asked is job}
            try:
                self.counts.answered += job.computed(own, begun[job])
            except AccuracyError as odd:
                self._fail(job, odd)

    def _fail(self, job: EmbeddingJob, error: Exception) -> None:
        self.counts.failed += 1
        job.failed(error)


def sizes_alike(tower: Embedder) -> tuple[int, ...]:
    """How many images may be computed together, in ascending order: 1, and of the powers of two
    and `tower.batch` those with which every embedding has the bits that it has alone.
    """
    most = tower.batch
    generator = np.random.default_rng(0)
    two = generator.standard_normal((2, 3, *tower.model.pixels)).astype(np.float32)
    alone = [tower.run(image[None])[0] for image in two]
    found = [1]
    for size in sorted({most, *(2**n for n in range(1, most.bit_length()))} - {1}):
        rows = tower.run(np.stack([two[number % 2] for number in range(size)]))
        if all(np.array_equal(row, alone[number % 2]) for number, row in enumerate(rows)):
            found.append(size)
    return tuple(found)
