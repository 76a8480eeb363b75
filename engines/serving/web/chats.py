"""/v1/chat/completions: one request becomes one job, its answer a response or a stream."""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Send

from edgevlm.engines.serving.job import Ended, Event, Job, Piece
from edgevlm.engines.serving.scheduler import Scheduler
from edgevlm.engines.serving.web import schema
from edgevlm.engines.serving.web.body import Gone, until_gone
from edgevlm.engines.serving.web.reply import Wording, error_object, event, refusal
from edgevlm.engines.serving.web.server import Server, next_event, sink_of


class Chats:
    """Answers to conversations."""

    def __init__(self, server: Server, scheduler: Scheduler) -> None:
        self._server, self._scheduler = server, scheduler

    async def answer(self, request: Request, send: Send) -> Response | None:
        """One answer. Its status is known when the first token is: what is wrong before is an
        error of its own.
        """
        events = asyncio.Queue[Event]()
        prepare = partial(self._prepared, asyncio.get_running_loop(), events)
        job, asked = await self._server.prepared(request, prepare)
        self._scheduler.submit(job)
        gone = asyncio.ensure_future(until_gone(request.receive))
        try:
            tokenizer = self._scheduler.session.tokenizer
            logprobs = asked.logprobs is not None
            wording = Wording(self._server.options.name, tokenizer, logprobs=logprobs)
            first = await next_event(events, gone)
            if asked.stream:
                await self._stream(send, first, events, gone, wording, asked.usage)
                return None
            return await self._whole(first, events, gone, wording)
        finally:
            gone.cancel()
            self._scheduler.cancel(job)  # without effect if it has ended

    def _prepared(
        self, loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], body: bytes
    ) -> tuple[Job, schema.Asked]:
        """Everything that takes time before a job waits; in a thread of the pool."""
        limits = self._scheduler.limits
        asked = schema.read(body, limits)
        self._server.check_model(asked.model)
        job = Job(
            self._scheduler.session,
            asked.question,
            sink_of(events, loop),
            logprobs=asked.logprobs,
            seconds=limits.request_s,
        )
        return job.prepare(), asked

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
            found = await next_event(events, gone)
        assert isinstance(found, Ended)
        self._server.metrics.answered(found.answer.timings_ms)
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
                found = await next_event(events, gone)
            assert isinstance(found, Ended)
            self._server.metrics.answered(found.answer.timings_ms)
            await write(wording.ended(found, with_usage=usage), more=False)
        except Gone:
            raise
        except Exception as odd:  # too late for a status: the stream says it
            refused = refusal(odd)
            self._server.metrics.refused(refused.status)
            await write(event(error_object(refused)), more=False)
