"""The engine as a model of Triton Inference Server's Python backend.

`edgevlm deploy triton` writes a model.py that hands `triton_python_backend_utils` over, which only
exists inside the server; see the backend's README for what it calls and what it expects:
github.com/triton-inference-server/python_backend.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event as Flag
from threading import Lock, Thread
from typing import Any

import numpy as np

from edgevlm.engines.runtime.question import Question
from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.serving.data_url import PREFIX, check_pixels, image_file
from edgevlm.engines.serving.embedding import (
    Computed,
    EmbeddingEvent,
    EmbeddingJob,
    EmbeddingQueue,
)
from edgevlm.engines.serving.job import Ended, Event, Failed, Job
from edgevlm.engines.serving.limits import Busy, Limits, OutOfTime
from edgevlm.engines.serving.scheduler import Scheduler
from edgevlm.engines.serving.work import Work, opened
from edgevlm.toolkit.errors import ConfigError, InputError, OutOfMemory, ToolkitError

_PREPARING = 2  # threads that decode images and tokenize
_POLL_S = 0.02  # between two looks at whether a client has gone


class Model(ABC):
    """What both kinds of engine share. utils: triton_python_backend_utils, set by model.py."""

    utils: Any = None

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine. Raises TritonModelException with the reason where it cannot be."""
        config = json.loads(args["model_config"])
        stated = {k: v["string_value"] for k, v in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"] / stated["engine"]
        slots, threads = int(stated["slots"]), int(stated["threads"])
        self._limits = Limits()
        self._opened = ExitStack()
        self._pool = ThreadPoolExecutor(_PREPARING, thread_name_prefix="edgevlm-prepare")
        try:
            working = opened(folder, self._limits, slots=slots, threads=threads)
            self._begin(self._opened.enter_context(working))
        except ToolkitError as odd:
            raise self.utils.TritonModelException(f"{odd.message} ({odd.hint})") from None

    @abstractmethod
    def _begin(self, work: Work) -> None:
        """Take the opened engine."""

    def finalize(self) -> None:
        """Close the engine; what has no answer yet fails."""
        self._pool.shutdown()
        self._opened.close()

    def _error(self, odd: Exception) -> Any:
        """A response that says what went wrong; what a client did not cause is not told in full."""
        kinds, said = self.utils.TritonError, getattr(odd, "message", str(odd))
        if isinstance(odd, (InputError, ConfigError)):
            found = kinds(f"{said} ({odd.hint})" if odd.hint else said, kinds.INVALID_ARG)
        elif isinstance(odd, (Busy, OutOfTime)):
            found = kinds(said, kinds.UNAVAILABLE)
        elif isinstance(odd, (MemoryError, OutOfMemory)):
            found = kinds("out of memory", kinds.UNAVAILABLE)
        else:
            found = kinds(f"the answer failed: {type(odd).__name__}", kinds.INTERNAL)
        return self.utils.InferenceResponse(output_tensors=[], error=found)

    def _cancelled(self) -> Any:
        found = self.utils.TritonError("the client has gone", self.utils.TritonError.CANCELLED)
        return self.utils.InferenceResponse(output_tensors=[], error=found)

    def _values(self, request: Any, name: str) -> list[Any]:
        """Copies of an input's elements, texts as bytes; [] for one that is not given."""
        tensor = self.utils.get_input_tensor_by_name(request, name)
        return [] if tensor is None else list(tensor.as_numpy().reshape(-1).tolist())

    def _images(self, given: Sequence[Any]) -> list[bytes]:
        """Files of images, which come as they are or as data URLs. Raises InputError."""
        found = []
        for number, value in enumerate(given):
            where, file = f"image {number + 1}", bytes(value)
            if file.startswith(PREFIX.encode()):
                found.append(image_file(file.decode(errors="replace"), where, self._limits))
                continue
            if len(file) > self._limits.image_bytes:
                raise InputError(f"{where} has more than {self._limits.image_bytes} bytes")
            check_pixels(file, where, self._limits)
            found.append(file)
        return found


class Embeddings(Model):
    """A vision tower by itself: `image` [batch, 1] to `embedding` [batch, channels]."""

    def _begin(self, work: Work) -> None:
        assert isinstance(work, EmbeddingQueue)
        self._queue = work

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request, in order; images of all requests share the batches."""
        waiting = [self._pool.submit(self._asked, request) for request in requests]
        return [
            self._response(request, one.result())
            for request, one in zip(requests, waiting, strict=True)
        ]

    def _asked(self, request: Any) -> SimpleQueue[EmbeddingEvent] | None:
        """Where a request's embeddings will come; None for one whose client has gone."""
        events = SimpleQueue[EmbeddingEvent]()
        try:
            if request.is_cancelled():
                return None
            images = self._images(self._values(request, "image"))
            if not images:
                raise InputError("image: there is none")
            job = EmbeddingJob(
                self._queue.tower, images, events.put, seconds=self._limits.request_s
            )
            self._queue.submit(job.prepare())
        except Exception as odd:
            events.put(Failed(odd))
        return events

    def _response(self, request: Any, events: SimpleQueue[EmbeddingEvent] | None) -> Any:
        if events is None:
            return self._cancelled()
        found = events.get()
        if isinstance(found, Computed):
            tensor = self.utils.Tensor("embedding", found.vectors)
            return self.utils.InferenceResponse(output_tensors=[tensor])
        return self._error(found.error)


class Answers(Model):
    """A vision-language model: decoupled, so that answers stream and many run at once."""

    def _begin(self, work: Work) -> None:
        assert isinstance(work, Scheduler)
        self._scheduler = work
        self._streams = set[Stream]()
        self._lock, self._ending = Lock(), Flag()
        self._watcher = Thread(target=self._watch, name="edgevlm-clients", daemon=True)
        self._watcher.start()

    def finalize(self) -> None:
        """Close the engine; answers that have not ended fail."""
        super().finalize()
        self._ending.set()
        self._watcher.join()

    def execute(self, requests: Sequence[Any]) -> None:
        """Begin to answer; responses go to each request's sender, from other threads."""
        for request in requests:
            stream = Stream(self, request.get_response_sender())
            names = ("prompt", "image", "max_tokens", "temperature", "top_p", "top_k", "seed")
            given = {name: self._values(request, name) for name in (*names, "stop", "stream")}
            self._pool.submit(self._begun, stream, given)  # tensors are gone when this returns

    def _begun(self, stream: Stream, given: dict[str, list[Any]]) -> None:
        try:
            question = self._question(given)
            stream.whole = not (given["stream"] and given["stream"][0])
            session, seconds = self._scheduler.session, self._limits.request_s
            job = Job(session, question, stream.take, seconds=seconds)
            stream.job = job
            with self._lock:
                self._streams.add(stream)
            self._scheduler.submit(job.prepare())
        except Exception as odd:
            stream.take(Failed(odd))

    def _question(self, given: dict[str, list[Any]]) -> Question:
        """Raises InputError."""
        few = {name: values for name, values in given.items() if name not in ("image", "stop")}
        for name, values in few.items():
            if len(values) > 1 or (name == "prompt" and not values):
                raise InputError(f"{name}: {len(values)} values, expected one")
        if len(given["image"]) > self._limits.images:
            raise InputError(f"image: more than {self._limits.images}")
        one = {name: values[0] for name, values in few.items() if values}
        most = self._limits.max_tokens
        tokens = one.get("max_tokens", most)
        if not 1 <= tokens <= most:
            raise InputError(f"max_tokens: {tokens}, expected 1 to {most}")
        sampling = Sampling(seed=one.get("seed"))
        if one.get("temperature"):
            sampling = replace(
                sampling,
                temperature=one["temperature"],
                top_k=one.get("top_k", 0),
                top_p=one.get("top_p", 1.0),
            )
        return Question(
            _text(one["prompt"], "prompt"),
            self._images(given["image"]),
            tokens,
            sampling,
            stop=[_text(value, "stop") for value in given["stop"]],
            literal=True,
        )

    def ended(self, stream: Stream) -> None:
        """A stream has sent its last response."""
        with self._lock:
            self._streams.discard(stream)

    def _watch(self) -> None:
        """End the answers whose client has gone."""
        while not self._ending.wait(_POLL_S):
            with self._lock:
                streams = list(self._streams)
            for stream in streams:
                if stream.sender.is_cancelled() and stream.job is not None:
                    self._scheduler.cancel(stream.job)
                    stream.send(self._cancelled(), last=True)


class Stream:
    """The responses of one request. whole: one response at the end, instead of one a token."""

    def __init__(self, model: Answers, sender: Any) -> None:
        self._model, self.sender = model, sender
        self.job: Job | None = None
        self.whole = True
        self._closed, self._lock = False, Lock()

    def take(self, found: Event) -> None:
        """What the scheduler reports."""
        if isinstance(found, Failed):
            self.send(self._model._error(found.error), last=True)
        elif isinstance(found, Ended):
            text = found.answer.text if self.whole else ""
            ids = found.answer.token_ids if self.whole else ()
            reason = found.answer.finish_reason
            self.send(self._response(text, ids, reason, found.answer.prompt_tokens), last=True)
        elif not self.whole:
            self.send(self._response(found.token.text, (found.token.id,), "", 0))

    def _response(self, text: str, ids: Sequence[int], reason: str, prompt_tokens: int) -> Any:
        values = {
            "text": np.asarray([text.encode()], object),
            "token_ids": np.asarray(ids, np.int32),
            "finish_reason": np.asarray([reason.encode()], object),
            "prompt_tokens": np.asarray([prompt_tokens], np.int32),
        }
        utils = self._model.utils
        tensors = [utils.Tensor(name, value) for name, value in values.items()]
        return utils.InferenceResponse(output_tensors=tensors)

    def send(self, response: Any, *, last: bool = False) -> None:
        """One more response, unless the last one was sent."""
        final = self._model.utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        with self._lock:
            if self._closed:
                return
            self._closed = last
            if last:
                self.sender.send(response, flags=final)
            else:
                self.sender.send(response)
        if last:
            self._model.ended(self)


def _text(value: Any, name: str) -> str:
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as odd:
        raise InputError(f"{name} is no text in UTF-8: {odd.reason}") from None
