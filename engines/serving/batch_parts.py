"""The folder of a batch job: its requests, finished parts, and how a part is computed and written.

    job.json            what the job is; a restart must be the same
    inputs.jsonl        every request
    parts/part-00000.*  rows of a part, .jsonl or .parquet, whole or not there
    done/00000.json     how many rows it has and what failed; written last: the part is finished

What a part holds does not depend on who computes it, nor on the other parts.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

from edgevlm.engines.runtime.embedding import Embedder, normalised
from edgevlm.engines.runtime.question import Question
from edgevlm.engines.runtime.request_file import Request
from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.runtime.session import Answer
from edgevlm.engines.serving import batch_input, batch_tables
from edgevlm.engines.serving.batch_input import Part
from edgevlm.engines.serving.job import Ended, Event, Failed, Job
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.scheduler import Scheduler
from edgevlm.engines.serving.work import opened
from edgevlm.toolkit.errors import InputError, ToolkitError
from edgevlm.toolkit.strict import to_json

INPUTS, PARTS, DONE = "inputs.jsonl", "parts", "done"
_PREPARED = 2  # requests that are prepared for each slot: one is answered, one waits
_ANSWER = ("text", "token_ids", "prompt_tokens", "image_tokens", "finish_reason", "notes")


@dataclass(frozen=True)
class Settings:
    """What the rows depend on, beside the requests and the engine.

    format: jsonl or parquet; part: requests of one; normalize: of a tower's embeddings; the others
    as of `serve` and `run`.
    """

    format: str = "jsonl"
    part: int = 256
    normalize: bool = False
    slots: int = 8
    strict: bool = False
    literal: bool = False
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Work:
    """What a process needs to compute parts."""

    engine: str
    out: str
    tower: bool
    settings: Settings
    threads: int


@dataclass(frozen=True)
class Done:
    """A finished part: its rows, and of those that failed, name and reason."""

    part: int
    rows: int
    seconds: float
    failed: tuple[tuple[str, str], ...]


class Worker:
    """An engine, opened once, that computes parts; a context manager that releases it."""

    def __init__(self, work: Work) -> None:
        """Raises what opening an engine raises."""
        self._work, self._out, self._opened = work, Path(work.out), ExitStack()
        self._rows = self._opened.enter_context(_rows(work))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def finish(self, part: Part) -> Done:
        """Compute a part and write it. Raises OSError, and what is no fault of a request."""
        started, form = time.perf_counter(), self._work.settings.format
        rows = self._rows(batch_input.read(self._out / INPUTS, part))
        table = batch_tables.EMBEDDINGS if self._work.tower else batch_tables.ANSWERS
        save = partial(batch_tables.save, table, form, rows)
        _write(self._out / PARTS / f"part-{part.number:05}.{form}", save)
        failed = [(_name(row), row["error"]) for row in rows if row["error"] is not None]
        seconds = round(time.perf_counter() - started, 3)
        done = Done(part.number, len(rows), seconds, tuple(failed))
        text = to_json(asdict(done)).encode()
        _write(done_file(self._out, part), lambda stream: stream.write(text))
        return done


def done_file(out: Path, part: Part) -> Path:
    """What says that a part is finished."""
    return out / DONE / f"{part.number:05}.json"


def finished(out: Path, part: Part) -> Done | None:
    """What an earlier run says of a part; None if it is still to be computed."""
    try:
        data = json.loads(done_file(out, part).read_text())
    except FileNotFoundError:
        return None
    failed = tuple((name, reason) for name, reason in data.pop("failed"))
    return Done(**data, failed=failed)


def _write(file: Path, save: Callable[[BinaryIO], object]) -> None:
    """Write a file, whole or not at all, whoever else writes the same one."""
    new = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with new.open("xb") as stream:
            save(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)


def _name(row: dict[str, Any]) -> str:
    if "file" in row:
        return str(row["file"])
    return f"line {row['line']}" + ("" if row["id"] is None else f" ({row['id']})")


Rows = Callable[[Sequence[dict[str, Any]]], "list[dict[str, Any]]"]


@contextmanager
def _rows(work: Work) -> Iterator[Rows]:
    """What computes the rows of requests."""
    settings = work.settings
    if work.tower:
        with Embedder.open(work.engine, threads=work.threads) as tower:
            yield partial(_embedded, tower, normalize=settings.normalize)
        return
    limits = Limits(queue=_PREPARED * settings.slots, request_s=float("inf"))
    how: dict[str, Any] = {"threads": work.threads, "strict": settings.strict}
    with opened(Path(work.engine), limits, slots=settings.slots, **how) as scheduler:
        assert isinstance(scheduler, Scheduler)
        given = Question("", sampling=settings.sampling, literal=settings.literal)
        yield partial(_answered, scheduler, given)


def _embedded(
    tower: Embedder, lines: Sequence[dict[str, Any]], *, normalize: bool
) -> list[dict[str, Any]]:
    rows = list[dict[str, Any]]()
    for one in tower.embed([line["file"] for line in lines]):
        vector = one.vector
        if vector is not None and normalize:
            vector = normalised(vector[None])[0]
        reason = one.reason if vector is None else None
        rows.append({"file": one.name, "embedding": vector, "error": reason})
    return rows


def _answered(
    scheduler: Scheduler, given: Question, lines: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each line, in order; as many are prepared at a time as keep all slots at work."""
    requests = [batch_input.asked(line, given) for line in lines]
    found: dict[int, Answer | Exception] = {}
    events, waiting, open_jobs = SimpleQueue[tuple[int, Event]](), iter(range(len(lines))), 0
    while len(found) < len(lines):
        for number in waiting:
            try:
                _submit(scheduler, requests[number].asked(), number, events)
            except (ToolkitError, MemoryError) as odd:
                found[number] = odd
                continue
            open_jobs += 1
            if open_jobs == _PREPARED * scheduler.limits.slots:
                break
        if not open_jobs:
            continue
        number, event = events.get()
        if isinstance(event, (Ended, Failed)):
            open_jobs -= 1
            found[number] = event.answer if isinstance(event, Ended) else event.error
    return [_row(requests[number], found[number]) for number in range(len(lines))]


def _submit(
    scheduler: Scheduler,
    question: Question,
    number: int,
    events: SimpleQueue[tuple[int, Event]],
) -> None:
    job = Job(scheduler.session, question, lambda event: events.put((number, event)))
    scheduler.submit(job.prepare())


def _row(request: Request, found: Answer | Exception) -> dict[str, Any]:
    """What is kept of a request: nothing that would differ when it is answered again."""
    question = request.question or Question("")
    row: dict[str, Any] = {"line": request.line, "id": request.id, "prompt": question.prompt}
    row["images"] = [str(image) for image in question.checked().images]
    if isinstance(found, Answer):
        return row | {name: getattr(found, name) for name in _ANSWER} | {"error": None}
    if not isinstance(found, (ToolkitError, MemoryError)):
        raise found
    reason = found.message if isinstance(found, ToolkitError) else "out of memory"
    return row | dict.fromkeys(_ANSWER) | {"error": reason}


def require_text_alone(makes_masks: bool, what: str) -> None:
    """Raise InputError for a model whose masks would be lost."""
    if makes_masks:
        raise InputError(
            f"{what} gives texts, and this model makes masks, which would be lost",
            hint="edgevlm run ENGINE --input FILE --output FILE keeps them",
        )
