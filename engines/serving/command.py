"""What the verb `serve` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.engines.serving.embedding import EmbeddingQueue
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.work import Work, kind_of, opened
from edgevlm.toolkit.errors import ConfigError, MissingExtra
from edgevlm.toolkit.terminal.console import Console

_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Serving:
    """How an engine is served; see the options of the verb. slots: None for what suits it."""

    host: str
    port: int
    key: str | None
    name: str | None
    slots: int | None
    grace_s: float
    threads: int
    strict: bool
    speculate: bool


def serve(engine: Path, limits: Limits, serving: Serving, console: Console) -> None:
    """Serve until told to stop; prints the address once requests are taken. Raises ToolkitError."""
    limits.check()
    if serving.grace_s < 0:
        raise ConfigError(f"--grace {serving.grace_s} is negative")
    if serving.key == "":
        raise ConfigError("--api-key is empty", hint="give a key, or drop the option")
    try:
        from edgevlm.engines.serving.web.app import Options
        from edgevlm.engines.serving.web.run import Address, bound, run
    except ImportError as lacking:
        package = (lacking.name or "fastapi").split(".")[0]
        raise MissingExtra(package, "serve", purpose="serving over HTTP") from None
    how: dict[str, Any] = {
        name: getattr(serving, name) for name in ("slots", "threads", "strict", "speculate")
    }
    listening = bound(Address(serving.host, serving.port))
    with listening, opened(engine, limits, **how) as work:
        name = serving.name or engine.resolve().name
        if serving.host not in _LOCAL and serving.key is None:
            console.note("everyone who reaches this address may ask: --api-key asks for a key")

        def started(url: str) -> None:
            lines = [f"{name} is served at {url}", f"a page: {url}/   the API: {url}/v1"]
            console.result(_facts(work, url, name), lines, "")

        run(work, Options(name, serving.key), listening, serving.grace_s, started)


def _facts(work: Work, url: str, name: str) -> dict[str, Any]:
    """What --json says once requests are taken."""
    together = max(work.sizes) if isinstance(work, EmbeddingQueue) else work.together
    return {
        "url": url,
        "model": name,
        "kind": kind_of(work),
        "slots": work.limits.slots,
        "rows_together": together,
    }
