"""HTTP/1.1 as uvicorn speaks it, with a limit on the time that a request's head may take.

uvicorn ends idle connections between requests, but waits without end for the rest of a head: a few
slow clients could hold all connections. The body has a limit of its own, in body.py.
"""

from __future__ import annotations

import asyncio
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
    """The protocol, with at most so many seconds for a request's head."""

    class Patient(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
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
