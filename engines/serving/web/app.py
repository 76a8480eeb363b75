"""The server's addresses: OpenAI's chat completions and models, health, metrics, a page.

Nothing here computes: a body is read and prepared in threads beside the event loop, and the
scheduler's thread answers. No request reaches a path, an address or a pickle.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from edgevlm.engines.serving.job import Ended, Event, Failed, Job, Piece
from edgevlm.engines.serving.limits import Busy
from edgevlm.engines.serving.scheduler import Scheduler
from edgevlm.engines.serving.web import schema
from edgevlm.engines.serving.web.body import Gone, Refused, invalid, read_body, until_gone
from edgevlm.engines.serving.web.metrics import Metrics
from edgevlm.engines.serving.web.reply import Wording, error_object, event, refusal

_PREPARING = 2  # threads that decode images and tokenize
_GONE = 499  # what nginx writes for a client that has closed its connection


@dataclass(frozen=True)
class Options:
    """name: of the model; key: what clients must send, None for all."""

    name: str
    key: str | None = None


class Server:
    """What the addresses share."""

    def __init__(self, scheduler: Scheduler, options: Options) -> None:
        self.scheduler, self.options = scheduler, options
        self.metrics = Metrics(scheduler)
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

    async def asked(self, request: Request) -> tuple[Job, schema.Asked, asyncio.Queue[Event]]:
        """A job in the queue, and where its events will come. Raises Refused, Gone, ToolkitError.

        As many requests are read at a time as can be answered or wait.
        """
        limits = self.scheduler.limits
        if self._arriving + self.scheduler.waiting >= limits.queue + limits.slots:
            raise Busy("too many requests are waiting", hint="ask again later")
        self._arriving += 1
        try:
            body = await read_body(request.headers, request.receive, limits)
            loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
            work = partial(self._prepared, body, loop, events)
            job, asked = await loop.run_in_executor(self._pool, work)
        finally:
            self._arriving -= 1
        self.scheduler.submit(job)
        return job, asked, events

    def _prepared(
        self, body: bytes, loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event]
    ) -> tuple[Job, schema.Asked]:
        """Everything that takes time before a job waits; in a thread of the pool."""
        limits = self.scheduler.limits
        asked = schema.read(body, limits)
        if asked.model not in (None, self.options.name):
            message = f"the model {asked.model!r:.80} is not served; {self.options.name!r} is"
            raise invalid(message, 404, "model_not_found")

        def sink(found: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody reads any more
                loop.call_soon_threadsafe(events.put_nowait, found)

        job = Job(
            self.scheduler.session,
            asked.question,
            sink,
            logprobs=asked.logprobs,
            seconds=limits.request_s,
        )
        return job.prepare(), asked


async def _next(events: asyncio.Queue[Event], gone: asyncio.Task[None]) -> Event:
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


class ChatResponse(Response):
    """Runs one job: reads the request, waits for the answer or streams it.

    The status is known when the first token is: what is wrong before is an error of its own.
    """

    def __init__(self, server: Server, request: Request) -> None:
        super().__init__()
        self._server, self._request = server, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server, job, gone = self._server, None, None
        try:
            server.check_key(self._request)
            job, asked, events = await server.asked(self._request)
            gone = asyncio.ensure_future(until_gone(self._request.receive))
            wording = Wording(
                server.options.name,
                server.scheduler.session.tokenizer,
                logprobs=asked.logprobs is not None,
            )
            first = await _next(events, gone)
            if asked.stream:
                await self._stream(send, first, events, gone, wording, asked.usage)
                return
            response = await self._whole(first, events, gone, wording)
        except Gone:
            server.metrics.refused(_GONE)
            return
        except Exception as odd:
            response = self.error(odd)
        finally:
            if gone is not None:
                gone.cancel()
            if job is not None:
                server.scheduler.cancel(job)  # without effect if it has ended
        await response(scope, receive, send)

    def error(self, odd: Exception) -> Response:
        """The answer to a request that failed."""
        refused = refusal(odd)
        self._server.metrics.refused(refused.status)
        headers = {"Connection": "close"}  # the rest of the body is not read
        if refused.status in (429, 503):
            headers["Retry-After"] = "1"
        return JSONResponse(error_object(refused), refused.status, headers)

    async def _whole(
        self,
        found: Event,
        events: asyncio.Queue[Event],
        gone: asyncio.Task[None],
        wording: Wording,
    ) -> Response:
        pieces = []
        while isinstance(found, Piece):
            pieces.append(found)
            found = await _next(events, gone)
        assert isinstance(found, Ended)
        self._server.metrics.answered(found)
        return JSONResponse(wording.whole(pieces, found))

    async def _stream(
        self,
        send: Send,
        found: Event,
        events: asyncio.Queue[Event],
        gone: asyncio.Task[None],
        wording: Wording,
        usage: bool,
    ) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await write(wording.begun())
        try:
            while isinstance(found, Piece):
                if chunk := wording.piece(found):
                    await write(chunk)
                found = await _next(events, gone)
            assert isinstance(found, Ended)
            self._server.metrics.answered(found)
            await write(wording.ended(found, with_usage=usage), more=False)
        except Gone:
            raise
        except Exception as odd:  # too late for a status: the stream says it
            refused = refusal(odd)
            self._server.metrics.refused(refused.status)
            await write(event(error_object(refused)), more=False)


def create(scheduler: Scheduler, options: Options) -> FastAPI:
    """The application around a scheduler, which the caller closes."""
    server = Server(scheduler, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()

    app = FastAPI(title="edgevlm", docs_url=None, redoc_url=None, lifespan=lifespan, version="1")
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    _add_chat(app, server)
    _add_state(app, server)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @app.exception_handler(HTTPException)
    async def refused(request: Request, odd: HTTPException) -> Response:
        found = invalid(str(odd.detail), odd.status_code)
        return JSONResponse(error_object(found), odd.status_code, odd.headers)

    @app.exception_handler(Refused)
    async def unauthorized(request: Request, odd: Refused) -> Response:
        return JSONResponse(error_object(odd), odd.status)

    app.openapi = partial(_described, app)  # type: ignore[method-assign]
    return app


# The page is one file, and loads nothing from elsewhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; " + (
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
)
_BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": "an error in OpenAI's words"}
    for status in (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
}


def _add_chat(app: FastAPI, server: Server) -> None:
    @app.post(
        "/v1/chat/completions",
        openapi_extra={"requestBody": _BODY},
        responses=_ERRORS,
        response_class=JSONResponse,
    )
    async def chat(request: Request) -> Response:
        """Answer a conversation with images."""
        return ChatResponse(server, request)

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def models(request: Request) -> dict[str, Any]:
        """The one model that is served."""
        server.check_key(request)
        model = {"id": server.options.name, "object": "model", "owned_by": "edgevlm"}
        return {"object": "list", "data": [model | {"created": server.created}]}


def _add_state(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether requests are taken."""
        scheduler = server.scheduler
        slots = {"slots": scheduler.limits.slots, "active": scheduler.active}
        name = server.options.name
        return {"status": "ok", "model": name, **slots, "waiting": scheduler.waiting}

    @app.get("/metrics", response_class=Response, responses={401: _ERRORS[401]})
    async def metrics(request: Request) -> Response:
        """Figures in Prometheus' text format."""
        server.check_key(request)
        text, kind = server.metrics.text()
        return Response(text, media_type=kind)


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description; the body of a chat is read by ourselves, so it is added here."""
    if app.openapi_schema is None:
        described = get_openapi(title=app.title, version=app.version, routes=app.routes)
        place = "#/components/schemas/{model}"
        model = schema.ChatRequest.model_json_schema(ref_template=place)
        schemas = described.setdefault("components", {}).setdefault("schemas", {})
        schemas |= model.pop("$defs")
        schemas["ChatRequest"] = model
        app.openapi_schema = described
    return app.openapi_schema
