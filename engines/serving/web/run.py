"""Running the server until it is told to stop."""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn

from edgevlm.engines.serving.web.app import Options, create
from edgevlm.engines.serving.web.protocol import patient
from edgevlm.engines.serving.work import Work
from edgevlm.toolkit.errors import InputError

_CONNECTIONS = 1000
_KEEP_ALIVE_S = 15


@dataclass(frozen=True)
class Address:
    """Where to listen. port: 0 takes a free one."""

    host: str
    port: int


def bound(address: Address) -> socket.socket:
    """A listening socket. Raises InputError where there can be none."""
    if not 0 <= address.port <= 65535:
        raise InputError(f"--port {address.port} is not between 0 and 65535")
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((address.host, address.port))
    except OSError as refused:
        found.close()
        taken = refused.errno == errno.EADDRINUSE
        raise InputError(
            f"cannot listen on {address.host} port {address.port}: {refused.strerror}",
            hint="another program listens there: choose another --port" if taken else "",
        ) from None
    return found


def run(
    work: Work,
    options: Options,
    listening: socket.socket,
    grace_s: float,
    started: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; answers that have begun get `grace_s` seconds.

    started: is called with the address once requests are taken.
    """
    limits = work.limits
    config = uvicorn.Config(
        create(work, options),
        http=patient(limits.receive_s),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(grace_s),
    )
    host, port = listening.getsockname()[:2]
    server = _Server(
        config, lambda: started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    )
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has stopped in good order, and raises the signal again
        pass
    finally:
        work.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
