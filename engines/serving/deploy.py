"""What the verb `deploy` writes: an engine as part of a larger serving system."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgevlm.engines import manifest
from edgevlm.engines.serving import ray_app
from edgevlm.toolkit.errors import ConfigError, OutputError
from edgevlm.toolkit.target import threads_here

KINDS = ("ray",)


@dataclass(frozen=True)
class Deployment:
    """name: of the model. slots: answers at a time of one replica; replicas: at most; threads: of
    a replica, 0 for all of its machine. host, port: where the proxies listen.
    """

    name: str
    slots: int = 8
    replicas: int = 4
    threads: int = 0
    host: str = "127.0.0.1"
    port: int = 8000


def deploy(kind: str, engine: Path, out: Path, deployment: Deployment) -> list[Path]:
    """Write the files of a deployment into the new folder `out`; returns them.

    Raises ConfigError, BundleError for a folder that is no engine, or OutputError.
    """
    if kind not in KINDS:
        raise ConfigError(f"there is no deployment {kind!r}", hint=f"known: {', '.join(KINDS)}")
    for option in ("slots", "replicas"):
        if getattr(deployment, option) < 1:
            raise ConfigError(f"--{option} {getattr(deployment, option)} is less than 1")
    manifest.read(engine)
    try:
        out.mkdir(parents=True)
    except OSError as refused:
        raise OutputError(
            f"{out} cannot be made: {refused.strerror}", hint="choose another name, or remove it"
        ) from None
    file = out / "serve.yaml"
    file.write_text(_ray(engine.resolve(), deployment), encoding="utf-8")
    return [file]


def _ray(engine: Path, d: Deployment) -> str:
    """Ray Serve's configuration. Strings are written as JSON, which YAML reads."""
    text = json.dumps
    return f"""\
# edgevlm on Ray Serve. One machine: serve run serve.yaml; a cluster: serve deploy serve.yaml.
# Every machine needs edgevlm[cpu,ray], and the engine at the same path.
proxy_location: EveryNode
http_options:
  host: {text(d.host)}
  port: {d.port}
applications:
  - name: edgevlm
    route_prefix: /
    import_path: {ray_app.PATH}
    args:
      engine: {text(str(engine))}
      name: {text(d.name)}
      slots: {d.slots}
      threads: {d.threads}
    deployments:
      - name: {ray_app.DEPLOYMENT}
        # Replicas follow the number of requests that are answered or wait, for each of them.
        autoscaling_config:
          min_replicas: 1
          max_replicas: {d.replicas}
          target_ongoing_requests: {d.slots}
        max_ongoing_requests: {2 * d.slots}
        ray_actor_options:
          num_cpus: {d.threads or threads_here()}
"""
