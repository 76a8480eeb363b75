"""Reading a request's body within limits, and noticing that its client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from edgevlm.engines.serving.limits import Limits

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Refused(Exception):
    """A request that is answered with an error. kind, code: as in OpenAI's error object."""

    def __init__(self, status: int, message: str, kind: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code = status, message, kind, code


class Gone(Exception):
    """The client has closed the connection."""


def invalid(message: str, status: int = 400, code: str | None = None) -> Refused:
    """What the client did wrong."""
    return Refused(status, message, "invalid_request_error", code)


async def read_body(headers: Any, receive: Receive, limits: Limits) -> bytes:
    """The whole body. Raises Refused if it is too large, too slow or of another type; Gone."""
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # browsers ask first before they send it to another site
        raise invalid(f"content-type {kind!r:.80}, expected application/json", 415)
    stated = headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > limits.body_bytes:
        raise _too_large(limits)
    try:
        return await asyncio.wait_for(_pieces(receive, limits), limits.receive_s)
    except asyncio.TimeoutError:
        raise invalid(f"the body did not arrive within {limits.receive_s:g} s", 408) from None


async def _pieces(receive: Receive, limits: Limits) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        body += message.get("body", b"")
        if len(body) > limits.body_bytes:
            raise _too_large(limits)
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(limits: Limits) -> Refused:
    return invalid(f"a body has at most {limits.body_bytes} bytes", 413)


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
