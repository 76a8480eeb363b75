"""Encoding one job's images in a thread beside the scheduler's: others get tokens meanwhile.

Encoders and the language model share neither buffers nor sessions on a processor, so what each of
them computes stays the same. A graphics card's runners share an arena: there, encoding waits its
turn, and the scheduler does it itself.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from edgevlm.engines.serving.image_cache import ImageCache
from edgevlm.engines.serving.job import Job


class Encoding:
    """At most one job whose images are being encoded. ended: is called when they are."""

    def __init__(self, images: ImageCache, ended: Callable[[], None]) -> None:
        self._images, self._ended = images, ended
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="edgevlm-encode")
        self._future: Future[None] | None = None
        self.job: Job | None = None

    def start(self, job: Job) -> None:
        """Encode the images of `job` and place it; no other one is being encoded."""
        self.job = job
        self._future = self._pool.submit(job.place, self._images)
        self._future.add_done_callback(lambda _: self._ended())

    @property
    def ready(self) -> bool:
        """Whether there is a job whose images are encoded, or cannot be."""
        return self._future is not None and self._future.done()

    def taken(self) -> tuple[Job, Exception | None]:
        """The job that is ready, and why its images cannot be encoded; the next one may start."""
        assert self.job is not None and self._future is not None
        job, failure = self.job, self._future.exception()
        assert failure is None or isinstance(failure, Exception)
        self.job = self._future = None
        return job, failure

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown()
