"""HTTP/1.1 as uvicorn speaks it, with two differences.

A request's head may take so long and no longer: uvicorn ends idle connections between requests, but
waits without end for the rest of a head, and a few slow clients could hold all connections. The
body has a limit of its own, in body.py.

A connection whose request is refused before all of its body is there is closed in two steps, as RFC
9112 (9.6) has it: first for writing, and for reading when the client has closed it, or after the
same time. What comes meanwhile is thrown away. Closed at once, it would be reset while the client
still sends, who would see a broken connection in place of the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_LATE = (
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s"
)
_BODY = (
    b'{"error": {"message": "the head of the request did not arrive in time", '
    b'"type": "invalid_request_error", "param": null, "code": null}}'
)


def patient(seconds: float) -> type[H11Protocol]:
    """The protocol, with at most so many seconds for a request's head, or for what is left of the
    body of one that was refused.
    """

    class Patient(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            whole = _ClosedInSteps(transport, seconds, self.loop, lambda: self._sends_a_body)
            super().connection_made(whole)  # type: ignore[arg-type]
            self._wait_for_head()

        @property
        def _sends_a_body(self) -> bool:
            return self.conn.their_state is h11.SEND_BODY

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_waiting()
            elif self._late is None:  # a part of the next head
                self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait_for_head(self) -> None:
            self._late = self.loop.call_later(seconds, self._refuse)

        def _stop_waiting(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _refuse(self) -> None:
            self._late = None
            answered = self.conn.our_state is h11.IDLE
            if not self.transport.is_closing() and answered:
                self.transport.write(_LATE % (len(_BODY), _BODY))
            self.transport.close()

    return Patient


class _ClosedInSteps:
    """A transport whose first `close` ends what we write, while `reads` says that the client is
    still sending; the second one, its own end, or the time closes all of it.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        seconds: float,
        loop: asyncio.AbstractEventLoop,
        reads: Callable[[], bool],
    ) -> None:
        self._whole, self._seconds, self._loop, self._reads = transport, seconds, loop, reads
        self._closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def is_closing(self) -> bool:
        return self._closing or self._whole.is_closing()

    def close(self) -> None:
        if self.is_closing() or not (self._reads() and self._whole.can_write_eof()):
            self._whole.close()
            return
        self._closing = True
        self._whole.write_eof()
        self._whole.resume_reading()
        self._loop.call_later(self._seconds, self._whole.close)
