"""Samples of a task: read from a file with one JSON object a line, asked, and scored one by one."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

from edgevlm.engines.evaluation.tasks import Progress, Request
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.errors import InputError, OutputError, ToolkitError
from edgevlm.toolkit.strict import Reader

T = TypeVar("T")
_SHOWN = 20  # answers between lines of progress


@dataclass(frozen=True)
class Sample(Generic[T]):
    """A line of the file: where it is, its question, and what a right answer is."""

    where: str
    id: Any
    prompt: str
    image: Path
    truth: T


@dataclass(frozen=True)
class Scored:
    """The scores of all samples that were answered, in order; and why others were not."""

    scores: tuple[dict[str, Any], ...]
    failed: tuple[str, ...]


def read(
    request: Request, keys: str, sample: Callable[[Reader, Path], Sample[T]]
) -> list[Sample[T]]:
    """The samples of a request's data file, the first `limit` of them.

    keys: those that a line may have, for people. sample: reads one, given the folder where images
    are. Raises InputError for the first line that is no sample, and for a missing image.
    """
    assert request.data is not None
    folder = request.images or request.data.parent
    found = []
    for reader in _objects(request.data):
        try:
            one = sample(reader, folder)
            reader.skip("id", "question_id", "image_id", "category")
            reader.done()
        except ToolkitError as odd:
            raise InputError(odd.message, hint=f"a line has the keys: {keys}") from None
        if not one.image.is_file():
            raise InputError(
                f"{one.where}: there is no image {one.image}",
                hint="--images FOLDER says where image paths begin",
            )
        found.append(one)
        if len(found) == request.limit:
            break
    if not found:
        raise InputError(f"{request.data} holds no sample", hint=f"a line has the keys: {keys}")
    return found


def _objects(file: Path) -> Iterator[Reader]:
    try:
        lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as refused:
        raise InputError(f"{file} cannot be read: {refused.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            data = json.loads(line.decode())
        except (ValueError, RecursionError) as broken:
            raise InputError(f"{where} is not JSON in UTF-8: {broken}") from None
        if not isinstance(data, dict):
            raise InputError(f"{where} is not a JSON object")
        yield Reader(data, where)


def identity(reader: Reader) -> Any:
    """What a line calls itself: `id`, or `question_id` as published files have it."""
    return reader.raw("id") if reader.has("id") else reader.raw("question_id")


def ask(
    request: Request, samples: list[Sample[T]], score: Callable[[str, T], dict[str, Any]]
) -> Scored:
    """Ask every sample's question, greedily, and score the answer's text.

    A sample that cannot be answered (an image that cannot be decoded, a prompt that is too long)
    does not stop the others. Raises ToolkitError where the engine cannot be opened.
    """
    assert request.max_tokens is not None
    scores, failed = [], []
    with (
        _written(request.answers) as file,
        Session.open(request.engine, threads=request.threads) as session,
    ):
        for number, sample in enumerate(samples, 1):
            entry: dict[str, Any] = {"where": sample.where, "id": sample.id}
            try:
                answer = session.answer(_question(request, sample))
                found = score(answer.text, sample.truth)
                scores.append(found)
                entry |= {"text": answer.text, **found}
            except ToolkitError as odd:
                failed.append(f"{sample.where}: {odd.message}")
                entry["error"] = odd.message
            if file is not None:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
            _tell(number, len(samples), request.progress)
    if not scores:
        raise InputError(f"no sample could be answered; the first: {failed[0]}")
    return Scored(tuple(scores), tuple(failed))


def _question(request: Request, sample: Sample[T]) -> Question:
    assert request.max_tokens is not None
    text = f"{sample.prompt}{request.suffix or ''}"
    return Question(
        text, str(sample.image), request.max_tokens, template=request.template or "auto"
    )


def _tell(number: int, count: int, progress: Progress) -> None:
    if number % _SHOWN == 0 or number == count:
        progress(f"{number} of {count} answered")


@contextmanager
def _written(output: Path | None) -> Iterator[TextIO | None]:
    if output is None:
        yield None
        return
    try:
        file = output.open("x", encoding="utf-8", errors="backslashreplace")
    except OSError as refused:
        raise OutputError(f"{output} cannot be written: {refused.strerror}") from None
    with file:
        yield file


def mean(scored: Scored, key: str) -> float:
    """The mean of a score over all samples."""
    return sum(float(found[key]) for found in scored.scores) / len(scored.scores)


def settings(request: Request) -> Mapping[str, Any]:
    """The options that shape an answer, as they were used."""
    names = ("max_tokens", "suffix", "template")
    return {name: getattr(request, name) for name in names}
