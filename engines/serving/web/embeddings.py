"""/v1/embeddings in OpenAI's words, for images instead of texts."""

from __future__ import annotations

import asyncio
import base64
from functools import partial
from typing import Annotated, Any, Literal, Union

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, ValidationError
from starlette.types import Send

from edgevlm.engines.serving.data_url import image_file
from edgevlm.engines.serving.embedding import (
    Computed,
    EmbeddingEvent,
    EmbeddingJob,
    EmbeddingQueue,
)
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.web.body import until_gone
from edgevlm.engines.serving.web.schema import Strict, said
from edgevlm.engines.serving.web.server import Server, next_event, sink_of
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.ops.vocabulary import Array


class EmbeddingRequest(Strict):
    """The body of /v1/embeddings. input: images as data URLs, data:image/png;base64,...: one, or
    a list of them.
    """

    input: Union[str, Annotated[list[str], Field(min_length=1)]]
    model: Union[str, None] = None
    encoding_format: Literal["float", "base64"] = "float"
    user: Union[str, None] = None


def read(body: bytes, limits: Limits, channels: int) -> tuple[EmbeddingRequest, list[bytes]]:
    """A request and the files of its images. Raises InputError that names the field."""
    try:
        request = EmbeddingRequest.model_validate_json(body)
    except ValidationError as odd:
        raise InputError(_said(odd, channels)) from None
    single = isinstance(request.input, str)
    urls = [request.input] if isinstance(request.input, str) else request.input
    if len(urls) > limits.images:
        raise InputError(f"input: {len(urls)} images, a request has {limits.images} at most")
    places = ["input" if single else f"input.{number}" for number in range(len(urls))]
    pairs = zip(urls, places, strict=True)
    return request, [image_file(url, place, limits) for url, place in pairs]


def _said(odd: ValidationError, channels: int) -> str:
    first = odd.errors(include_url=False, include_context=False)[0]
    field = first["loc"][:1]
    if field == ("dimensions",):
        return f"dimensions: an embedding has its tower's {channels} channels; none are left out"
    if field == ("input",) and first["type"] != "missing":
        return "input: expected an image as a data URL (data:image/...;base64,...), or a list"
    return said(first)


class Embeddings:
    """Embeddings of a request's images."""

    def __init__(self, server: Server, queue: EmbeddingQueue) -> None:
        self._server, self._queue = server, queue

    async def answer(self, request: Request, send: Send) -> Response:
        """One list of embeddings."""
        events = asyncio.Queue[EmbeddingEvent]()
        prepare = partial(self._prepared, asyncio.get_running_loop(), events)
        job, base64_wanted = await self._server.prepared(request, prepare)
        self._queue.submit(job)
        gone = asyncio.ensure_future(until_gone(request.receive))
        try:
            found: Computed = await next_event(events, gone)
        finally:
            gone.cancel()
            self._queue.cancel(job)  # without effect if it has ended
        self._server.metrics.answered(found.timings_ms)
        return JSONResponse(self._worded(found, base64_wanted))

    def _prepared(
        self, loop: asyncio.AbstractEventLoop, events: asyncio.Queue[EmbeddingEvent], body: bytes
    ) -> tuple[EmbeddingJob, bool]:
        tower, limits = self._queue.tower, self._queue.limits
        asked, files = read(body, limits, tower.model.channels)
        self._server.check_model(asked.model)
        job = EmbeddingJob(tower, files, sink_of(events, loop), seconds=limits.request_s)
        return job.prepare(), asked.encoding_format == "base64"

    def _worded(self, found: Computed, base64_wanted: bool) -> dict[str, Any]:
        rows = [
            {"object": "embedding", "index": number, "embedding": _value(row, base64_wanted)}
            for number, row in enumerate(found.vectors)
        ]
        return {
            "object": "list",
            "data": rows,
            "model": self._server.options.name,
            "usage": {"prompt_tokens": 0, "total_tokens": 0},  # there is no text
            "edgevlm": {"timings_ms": found.timings_ms},
        }


def _value(row: Array, base64_wanted: bool) -> Any:
    """Numbers, whose float32 they give back exactly; or its bytes, the lowest first."""
    if base64_wanted:
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return row.tolist()
