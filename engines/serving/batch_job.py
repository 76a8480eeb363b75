"""The work of `edgevlm batch`: a large set answered or embedded in parts, here or on Ray."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from edgevlm.engines import manifest
from edgevlm.engines.runtime.question import Question
from edgevlm.engines.serving import batch_input, batch_parts, ray_data
from edgevlm.engines.serving.batch_input import Part
from edgevlm.engines.serving.batch_parts import DONE, INPUTS, PARTS, Done, Settings, Work, Worker
from edgevlm.engines.serving.batch_tables import FORMATS
from edgevlm.engines.serving.ray_data import Cluster, Share
from edgevlm.engines.serving.work import CHAT, EMBEDDINGS
from edgevlm.toolkit.bundle.atomic import output_error, sha256_of
from edgevlm.toolkit.bundle.unfinished import try_lock
from edgevlm.toolkit.errors import ConfigError, InputError, MissingExtra, OutputError
from edgevlm.toolkit.strict import to_json, to_plain
from edgevlm.toolkit.terminal.console import Console
from edgevlm.toolkit.vlm.towers import TowerConfig

_JOB, _LOCK, _FORMAT = "job.json", ".lock", 1
_TOLD = 100  # failures that the result names


@dataclass(frozen=True)
class BatchResult:
    """What `edgevlm batch --json` prints. seconds, requests_per_s: of this run alone.

    resumed_parts: that earlier runs had finished. failures: name and reason of the first hundred.
    """

    engine: str
    output: str
    kind: str
    requests: int
    parts: int
    resumed_parts: int
    failed: int
    failures: tuple[tuple[str, str], ...]
    processes: int
    threads: int
    seconds: float
    requests_per_s: float


def answer(
    engine: Path,
    source: Path,
    out: Path,
    given: Question,
    settings: Settings,
    *,
    threads: int,
    cluster: Cluster | None,
    console: Console,
) -> BatchResult:
    """Answer every request of `source`, or embed every image; a killed job goes on when the same is
    asked again.

    given: what all questions share. cluster: None computes in this process. Raises ToolkitError;
    InputError if no request is good.
    """
    tower, on_card = _checked(engine, given, settings)
    asked = batch_input.files(source) if tower else batch_input.questions(source, given)
    lines = batch_input.begun(asked)
    with ExitStack() as opened:
        opened.enter_context(_folder(out))
        requests = _begin(out, lines, engine, settings)
        parts = batch_input.parts(out / INPUTS, settings.part)
        old = {part: batch_parts.finished(out, part) for part in parts}
        left = [part for part in parts if old[part] is None]
        done = [one for one in old.values() if one is not None]
        tell, before = opened.enter_context(console.bar("requests", requests)), _rows(done)
        tell(before)
        share = Share(1, threads)
        if cluster is not None and left:
            share = opened.enter_context(ray_data.connected(cluster, threads, on_card=on_card))
        work = Work(str(engine.resolve()), str(out.resolve()), tower, settings, share.threads)
        started = time.perf_counter()
        for one in _here(work, left) if cluster is None else ray_data.finish(work, left, share):
            done.append(one)
            tell(_rows(done))
        seconds = time.perf_counter() - started
    failures = [failure for one in sorted(done, key=lambda one: one.part) for failure in one.failed]
    if len(failures) == requests:
        raise InputError(
            f"none of {requests} requests can be answered; the first: {failures[0][1]}"
        )
    return BatchResult(
        str(engine),
        str(out),
        EMBEDDINGS if tower else CHAT,
        requests,
        len(parts),
        len(parts) - len(left),
        len(failures),
        tuple(failures[:_TOLD]),
        share.actors,
        share.threads,
        round(seconds, 3),
        round((requests - before) / max(seconds, 1e-9), 3),
    )


def lines(result: BatchResult) -> list[str]:
    """The result for people."""
    what = "embeddings" if result.kind == EMBEDDINGS else "answers"
    rows = [f"failed: {name}: {reason}" for name, reason in result.failures]
    if result.failed > len(result.failures):
        rows.append(f"failed: {result.failed - len(result.failures)} more, see {DONE}/")
    rows.append(
        f"{result.output}/{PARTS}: {result.requests - result.failed} {what} in {result.parts} parts"
    )
    if result.failed:
        rows.append(f"{result.failed} of {result.requests} requests failed")
    if result.resumed_parts:
        rows.append(f"{result.resumed_parts} of the parts by an earlier run")
    rows.append(f"{result.requests_per_s:.3g} requests/s, processes: {result.processes}")
    return rows


def cluster_of(address: str | None, actors: int | None) -> Cluster | None:
    """Where a job is spread, if it is. Raises ConfigError."""
    if address is not None:
        return Cluster(address, actors)
    if actors is not None:
        raise ConfigError("--actors are processes of Ray", hint="add --ray local")
    return None


def _rows(done: Sequence[Done]) -> int:
    return sum(one.rows for one in done)


def _here(work: Work, parts: Sequence[Part]) -> Iterator[Done]:
    """The parts one after the other, in this process."""
    if parts:
        with Worker(work) as worker:
            for part in parts:
                yield worker.finish(part)


def _checked(engine: Path, given: Question, settings: Settings) -> tuple[bool, bool]:
    """Whether the engine is a tower by itself, and whether it runs on a card. Raises ToolkitError
    for settings that it has no use for.
    """
    found = manifest.read(engine)
    tower = isinstance(found.parsed_model(), TowerConfig)
    if settings.format not in FORMATS:
        raise ConfigError(
            f"--format {settings.format!r:.40} is unknown", hint=f"known: {', '.join(FORMATS)}"
        )
    if settings.format == "parquet" and find_spec("pyarrow") is None:
        raise MissingExtra("pyarrow", "parquet", purpose="--format parquet")
    for option, value in (("--part", settings.part), ("--slots", settings.slots)):
        if value < 1:
            raise ConfigError(f"{option} {value} is less than 1")
    if tower and (given.prompt or settings.strict or settings.literal):
        option = "--prompt" if given.prompt else "--strict" if settings.strict else "--literal"
        raise ConfigError(f"{option} is for questions, and {engine} is a vision tower by itself")
    if not tower:
        if settings.normalize:
            raise ConfigError("--normalize is for embeddings, and this engine answers questions")
        batch_parts.require_text_alone(found.parsed_vlm().segmenter is not None, "batch")
        settings.sampling.check()
    return tower, found.parsed_target().on_card


def _begin(out: Path, lines: Iterator[str], engine: Path, settings: Settings) -> int:
    """Keep the requests in the job's folder; how many there are. Raises OutputError where it holds
    another job.
    """
    new, kept = out / f".{INPUTS}.new", out / _JOB
    count, sha256 = batch_input.write(new, lines)
    job = {
        "format": _FORMAT,
        "engine": sha256_of(engine / manifest.DESCRIPTION),
        "requests": count,
        "inputs": sha256,
        "settings": to_plain(settings),
    }
    if kept.exists():
        new.unlink()
        old = json.loads(kept.read_text())
        other = [name for name in job if old.get(name) != json.loads(to_json(job))[name]]
        if other:
            raise OutputError(
                f"{out} holds another job: {', '.join(other)} differ", hint="name another folder"
            )
    else:
        os.replace(new, out / INPUTS)
        new.write_text(to_json(job) + "\n")
        os.replace(new, kept)
    for name in (PARTS, DONE):
        (out / name).mkdir(exist_ok=True)
        for leftover in (out / name).glob(".*"):  # of a process that was killed
            leftover.unlink()
    return count


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """The job's folder, in which nobody else is at work. Raises OutputError."""
    ours = {_JOB, _LOCK, INPUTS, f".{INPUTS}.new", PARTS, DONE}
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = sorted({entry.name for entry in out.iterdir()} - ours)
        if foreign:
            raise OutputError(
                f"{out} holds what is no part of a job: {', '.join(foreign[:3])}",
                hint="name a new folder, or that of a job which is to go on",
            )
        descriptor = os.open(out / _LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            if try_lock(descriptor) is False:
                raise OutputError(f"another process is at work in {out}")
            yield
        finally:
            os.close(descriptor)
    except OSError as refused:
        raise output_error(refused, out) from None
