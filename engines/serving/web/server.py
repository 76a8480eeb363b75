"""What all addresses of the server share: the key, bodies within limits, errors, metrics."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from edgevlm.engines.serving.job import Failed
from edgevlm.engines.serving.limits import Busy
from edgevlm.engines.serving.web.body import Gone, Refused, invalid, read_body
from edgevlm.engines.serving.web.metrics import Metrics
from edgevlm.engines.serving.web.reply import error_object, refusal
from edgevlm.engines.serving.work import Work, kind_of

_PREPARING = 2  # threads that decode images and tokenize
_GONE = 499  # what nginx writes for a client that has closed its connection

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """name: of the model; key: what clients must send, None for all."""

    name: str
    key: str | None = None


class Server:
    """What the addresses share. kind: of the engine, as /v1/models and /health say it."""

    def __init__(self, work: Work, options: Options) -> None:
        self.work, self.options, self.kind = work, options, kind_of(work)
        self.metrics = Metrics(work)
        self.created = int(time.time())
        self._pool = ThreadPoolExecutor(_PREPARING, thread_name_prefix="edgevlm-prepare")
        self._arriving = 0

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def check_key(self, request: Request) -> None:
        """Raise Refused for a request without the key."""
        if self.options.key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.options.key.encode()):
            message = "the API key is missing or wrong: send Authorization: Bearer KEY"
            raise Refused(401, message, "invalid_request_error", "invalid_api_key")

    def check_model(self, name: str | None) -> None:
        """Raise Refused for a model that is not the one that is served."""
        if name not in (None, self.options.name):
            message = f"the model {name!r:.80} is not served; {self.options.name!r} is"
            raise invalid(message, 404, "model_not_found")

    async def prepared(self, request: Request, prepare: Callable[[bytes], T]) -> T:
        """What `prepare` makes of the request's body, in a thread. Raises Refused, Gone and
        ToolkitError. As many requests are read at a time as can be answered or wait.
        """
        limits = self.work.limits
        if self._arriving + self.work.waiting >= limits.queue + limits.slots:
            raise Busy("too many requests are waiting", hint="ask again later")
        self._arriving += 1
        try:
            body = await read_body(request.headers, request.receive, limits)
            return await asyncio.get_running_loop().run_in_executor(self._pool, prepare, body)
        finally:
            self._arriving -= 1

    def error(self, odd: Exception) -> Response:
        """The answer to a request that failed."""
        refused = refusal(odd)
        self.metrics.refused(refused.status)
        headers = {"Connection": "close"}  # the rest of the body is not read
        if refused.status in (429, 503):
            headers["Retry-After"] = "1"
        return JSONResponse(error_object(refused), refused.status, headers)


class Exchange(Response):
    """Reads one request and answers it.

    answer: is given the request and where a stream goes; returns the response, None if it has
    streamed one.
    """

    def __init__(
        self,
        server: Server,
        request: Request,
        answer: Callable[[Request, Send], Awaitable[Response | None]],
    ) -> None:
        super().__init__()
        self._server, self._request, self._answer = server, request, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response | None
        try:
            self._server.check_key(self._request)
            response = await self._answer(self._request, send)
        except Gone:
            self._server.metrics.refused(_GONE)
            return
        except Exception as odd:
            response = self._server.error(odd)
        if response is not None:
            await response(scope, receive, send)


def sink_of(events: asyncio.Queue[Any], loop: asyncio.AbstractEventLoop) -> Callable[[Any], None]:
    """Where another thread puts what comes into `events`."""

    def sink(found: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody reads any more
            loop.call_soon_threadsafe(events.put_nowait, found)

    return sink


async def next_event(events: asyncio.Queue[Any], gone: asyncio.Task[None]) -> Any:
    """The next event. Raises Gone when the client leaves before, and what the job failed with."""
    coming = asyncio.ensure_future(events.get())
    await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not coming.done():
        coming.cancel()
        raise Gone
    found = coming.result()
    if isinstance(found, Failed):
        raise found.error
    return found
