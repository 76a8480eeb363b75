"""Parts of a batch job on Ray Data: actors with the engine loaded once, on one machine or many.

What goes through Ray are numbers of parts. Requests are read from the job's folder, and rows
written there, by the actor itself. An actor that dies is replaced, and its part computed again.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgevlm.engines.serving.batch_input import Part
from edgevlm.engines.serving.batch_parts import Done, Work, Worker
from edgevlm.toolkit.bundle.atomic import output_error
from edgevlm.toolkit.errors import ConfigError, MissingExtra, ToolkitError
from edgevlm.toolkit.strict import to_json
from edgevlm.toolkit.target import threads_here

LOCAL = "local"
_DEATHS = 5  # of an actor: a part that takes its memory each time must not go on for ever
_STORE_BYTES = 100 << 20  # Ray's shared memory; numbers of parts are all that is in it


@dataclass(frozen=True)
class Cluster:
    """address: `local` for this machine alone, `auto` for the cluster that it belongs to, or where
    one is. actors: None for one on each machine.
    """

    address: str
    actors: int | None


@dataclass(frozen=True)
class Share:
    """Processes, and the processor threads of each; gpus: cards of each."""

    actors: int
    threads: int
    gpus: int = 0


@contextmanager
def connected(cluster: Cluster, threads: int, *, on_card: bool) -> Iterator[Share]:
    """Ray, until the end, and what each actor gets of it. threads: 0 for an equal share.

    Raises MissingExtra, or ConfigError where there is no such cluster, or not enough of it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    # As an error it tells that actors which are replaced need their arguments, which are kept.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
    except ImportError:
        raise MissingExtra("ray[data]", "ray", purpose="a batch on Ray") from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if cluster.address == LOCAL:
        options |= {"num_cpus": threads_here(), "object_store_memory": _STORE_BYTES}
        options["include_dashboard"] = False
    with redirect_stdout(sys.stderr):  # Ray prints that a process has died; stdout is ours
        try:
            ray.init(address=cluster.address, **options)
        except (ConnectionError, ValueError) as refused:
            raise ConfigError(
                f"--ray {cluster.address}: {refused}", hint="--ray local begins one on this machine"
            ) from None
        try:
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            yield _share(cluster, threads, machines, on_card=on_card)
        finally:
            ray.shutdown()


def _share(
    cluster: Cluster, threads: int, machines: Sequence[dict[str, float]], *, on_card: bool
) -> Share:
    """Raises ConfigError for more than the machines have: Ray would wait for it without end."""
    cores = [int(machine.get("CPU", 0)) for machine in machines]
    actors = len(cores) if cluster.actors is None else cluster.actors
    if actors < 1:
        raise ConfigError(f"--actors {actors} is less than 1")
    if not threads:  # the most with which all find room
        counts = range(max(cores), 1, -1)
        threads = next((n for n in counts if sum(c // n for c in cores) >= actors), 1)
    most = sum(count // threads for count in cores)
    if actors > most:
        raise ConfigError(
            f"--actors {actors} with {threads} threads each do not fit: the processors of the "
            f"{len(cores)} machine(s), {sum(cores)} in all, hold {most}",
            hint="lower --actors or --threads",
        )
    cards = sum(int(machine.get("GPU", 0)) for machine in machines)
    if on_card and actors > cards:
        raise ConfigError(f"--actors {actors}: the engine runs on a card, and there are {cards}")
    return Share(actors, threads, int(on_card))


def finish(work: Work, parts: Sequence[Part], share: Share) -> Iterator[Done]:
    """Compute parts on the actors of a connected Ray; each as it is finished.

    Raises the ToolkitError with which an actor's engine was refused.
    """
    if not parts:
        return
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # which the import has set otherwise
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    rows = [asdict(part) for part in parts]
    numbers = ray.data.from_items(rows, override_num_blocks=len(rows))
    done = numbers.map_batches(
        Actor,
        fn_constructor_args=(work,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=share.actors),
        num_cpus=share.threads,
        num_gpus=share.gpus,
        max_restarts=_DEATHS,
        max_task_retries=_DEATHS,
    )
    for row in _rows(done):
        found = json.loads(row["done"])
        if "message" in found:
            raise ToolkitError(found["message"], hint=found["hint"])
        yield Done(**found | {"failed": tuple(map(tuple, found["failed"]))})


def _rows(done: Any) -> Iterator[dict[str, Any]]:
    """What the actors return. Raises ToolkitError where a part has ended too many of them."""
    from ray.exceptions import RayError

    try:
        yield from done.iter_rows()
    except RayError as odd:
        reason = str(odd).strip().splitlines()[0]
        raise ToolkitError(
            f"processes of Ray died again and again: {reason}",
            hint="give each more memory: lower --actors or --slots; the same command goes on",
        ) from None


class Actor:
    """A process of Ray: its engine is opened with its first part.

    What is refused comes back as a row: an error that Ray passes on has lost its words.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """One part, by its numbers."""
        number, offset, nbytes = (int(batch[name][0]) for name in ("number", "offset", "nbytes"))
        try:
            self._worker = self._worker or Worker(self._work)
            found: Any = asdict(self._worker.finish(Part(number, offset, nbytes)))
        except ToolkitError as odd:
            found = {"message": odd.message, "hint": odd.hint}
        except OSError as refused:
            why = output_error(refused, Path(self._work.out))
            found = {"message": why.message, "hint": why.hint}
        return {"done": [to_json(found)]}
