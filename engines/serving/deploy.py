"""What the verb `deploy` writes: an engine as part of a larger serving system."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from edgevlm.engines import manifest
from edgevlm.engines.manifest import Engine
from edgevlm.engines.runtime import memory
from edgevlm.engines.serving import ray_app, triton_repository
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.triton_repository import Repository
from edgevlm.toolkit.errors import ConfigError, OutputError
from edgevlm.toolkit.target import threads_here
from edgevlm.toolkit.vlm.towers import TowerConfig

RAY, TRITON = "ray", "triton"
KINDS = (RAY, TRITON)
_REPLICAS = {RAY: 4, TRITON: 1}


@dataclass(frozen=True)
class Deployment:
    """name: of the model. slots: answers, or images of a tower, at a time of one replica, None for
    what suits the engine; replicas: at most, None for 4 of Ray and 1 of Triton; threads: of a
    replica, 0 for all of its machine. host, port: where Ray's proxies listen; reference: whether
    Triton finds the engine where it is.
    """

    name: str
    slots: int | None = None
    replicas: int | None = None
    threads: int = 0
    host: str | None = None
    port: int | None = None
    reference: bool = False


def deploy(kind: str, engine: Path, out: Path, deployment: Deployment) -> tuple[list[Path], str]:
    """Write the files of a deployment into the new folder `out`; returns those that are to be read,
    and the command that comes next.

    Raises ConfigError, BundleError for a folder that is no engine, InputError for an engine whose
    answers would lose something, or OutputError.
    """
    if kind not in KINDS:
        raise ConfigError(f"there is no deployment {kind!r}", hint=f"known: {', '.join(KINDS)}")
    for option in ("slots", "replicas"):
        value = getattr(deployment, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} {value} is less than 1")
    for option, theirs in (("host", RAY), ("port", RAY), ("reference", TRITON)):
        if getattr(deployment, option) and theirs != kind:
            raise ConfigError(f"--{option} is for deploy {theirs}", hint="leave it out")
    found = manifest.read(engine)
    slots, replicas = _numbers(found, kind, deployment)
    asked = Repository(deployment.name, slots, replicas, deployment.threads, deployment.reference)
    if kind == TRITON:
        triton_repository.check(found, asked)
    try:
        out.mkdir(parents=True)
    except OSError as refused:
        raise OutputError(
            f"{out} cannot be made: {refused.strerror}", hint="choose another name, or remove it"
        ) from None
    if kind == RAY:
        file = out / "serve.yaml"
        file.write_text(_ray(engine.resolve(), deployment, slots, replicas), encoding="utf-8")
        return [file], shlex.join(["serve", "run", str(file)])
    try:
        files = triton_repository.write(engine, found, out, asked)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return files, f"see {out / 'README.md'}"


def _numbers(engine: Engine, kind: str, deployment: Deployment) -> tuple[int, int]:
    """Slots and replicas, those that were left open too."""
    tower = isinstance(engine.parsed_model(), TowerConfig)
    usual = memory.images_at_a_time(engine) if tower else Limits.slots
    return deployment.slots or usual, deployment.replicas or _REPLICAS[kind]


def _ray(engine: Path, d: Deployment, slots: int, replicas: int) -> str:
    """Ray Serve's configuration. Strings are written as JSON, which YAML reads."""
    text = json.dumps
    return f"""\
# edgevlm on Ray Serve. One machine: serve run serve.yaml; a cluster: serve deploy serve.yaml.
# Every machine needs edgevlm[cpu,ray], and the engine at the same path.
proxy_location: EveryNode
http_options:
  host: {text(d.host or "127.0.0.1")}
  port: {d.port or 8000}
applications:
  - name: edgevlm
    route_prefix: /
    import_path: {ray_app.PATH}
    args:
      engine: {text(str(engine))}
      name: {text(d.name)}
      slots: {slots}
      threads: {d.threads}
    deployments:
      - name: {ray_app.DEPLOYMENT}
        # Replicas follow the number of requests that are answered or wait, for each of them.
        autoscaling_config:
          min_replicas: 1
          max_replicas: {replicas}
          target_ongoing_requests: {slots}
        max_ongoing_requests: {2 * slots}
        ray_actor_options:
          num_cpus: {d.threads or threads_here()}
"""
