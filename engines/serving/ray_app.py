"""The server as a Ray Serve application: replicas of one engine behind Ray's HTTP proxies.

`edgevlm deploy ray` writes a configuration that names `application`; Ray calls it with the
configuration's arguments, and its result once in every replica.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.toolkit.errors import MissingExtra
from edgevlm.toolkit.strict import Reader

DEPLOYMENT = "edgevlm"
PATH = f"{__name__}:application"


def application(arguments: Mapping[str, Any]) -> Any:
    """A ray.serve Application. arguments: engine, name, slots and threads, as `serve` has them.

    Raises MissingExtra without Ray, and ConfigError for other arguments.
    """
    try:
        from ray import serve
    except ImportError:
        raise MissingExtra("ray[serve]", "ray", purpose="serving on Ray") from None
    r = Reader(arguments, "the application's args")
    engine, name = r.take("engine", str), r.take("name", str)
    slots, threads = r.count("slots"), r.take("threads", int, 0)
    r.done()

    def replica() -> Any:
        return _app(Path(engine), name, slots, threads)

    return serve.deployment(serve.ingress(replica)(), name=DEPLOYMENT).bind()


def _app(engine: Path, name: str, slots: int | None, threads: int) -> Any:
    """What a replica runs; its process ends with it."""
    from edgevlm.engines.serving.limits import Limits
    from edgevlm.engines.serving.web.app import Options, create
    from edgevlm.engines.serving.work import opened

    working = opened(engine, Limits(), slots=slots, threads=threads)
    app = create(working.__enter__(), Options(name))
    app.state.working = working  # a context manager that nobody holds would close the engine
    return app
