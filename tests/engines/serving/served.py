"""A server of this project on a port of this machine, and clients for it."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from edgevlm.engines.runtime.session import Session
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.scheduler import Scheduler
from edgevlm.engines.serving.web.app import Options, create
from edgevlm.engines.serving.web.protocol import patient
from edgevlm.engines.serving.work import Work
from tests.engines.serving.asking import wait_for

JSON = {"Content-Type": "application/json"}


@dataclass
class Served:
    """A running server; scheduler: of an engine with a language model."""

    port: int
    scheduler: Scheduler

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, body: bytes | str | None = None, **headers: str
    ) -> tuple[int, Any]:
        """Status and body, parsed where it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or (JSON if body is not None else {}))
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        kind = response.getheader("content-type") or ""
        return response.status, json.loads(data) if "json" in kind else data

    def chat(self, **fields: Any) -> tuple[int, Any]:
        """The answer to a chat request."""
        return self.request("POST", "/v1/chat/completions", json.dumps(fields))

    def raw(self, data: bytes) -> socket.socket:
        """A connection that has sent `data`."""
        found = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        found.sendall(data)
        return found

    def wait_until_idle(self) -> None:
        """Until nobody waits or is answered. In this order: who waits is answered later on."""
        wait_for(lambda: self.scheduler.waiting == 0 and self.scheduler.active == 0)


@contextmanager
def serving(
    session: Session, limits: Limits, options: Options | None = None, **how: Any
) -> Iterator[Served]:
    """A server in a thread of its own, which is stopped at the end."""
    scheduler = Scheduler(session, limits, **how)
    with listening(scheduler, options) as port:
        yield Served(port, scheduler)


@contextmanager
def listening(work: Work, options: Options | None = None) -> Iterator[int]:
    """The port of a server around `work`, both of which end with the block."""
    config = uvicorn.Config(
        create(work, options or Options("tiny")),
        http=patient(work.limits.receive_s),
        ws="none",
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        work.close()
        bound.close()


def data_url(path: Path) -> str:
    """An image file as a data URL."""
    kind = path.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def user(text: str, *images: Path) -> Any:
    """A user's message, for any client."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(path)}} for path in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
