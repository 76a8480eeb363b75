"""What a batch job is asked: a folder, a list or a file of requests, as one file of lines.

The file stands in the job's folder, so that every process reads its part of the same requests, and
a restart finds out whether it was given the same ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from edgevlm.engines.runtime import image_list, request_file
from edgevlm.engines.runtime.question import Question
from edgevlm.engines.runtime.request_file import Request
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.strict import to_json

REQUESTS = ".jsonl"


@dataclass(frozen=True)
class Part:
    """Consecutive lines of the file of requests. offset, nbytes: where they stand in it."""

    number: int
    offset: int
    nbytes: int


def is_requests(source: Path) -> bool:
    """Whether `source` holds prompts of its own: by its ending, as a list of files has none."""
    return source.suffix == REQUESTS and not source.is_dir()


def images(source: Path) -> list[str]:
    """The images of a folder, or of a list with one a line. Raises InputError."""
    if source.is_dir():
        return image_list.gather([source], None)
    return image_list.gather([], source)


def questions(source: Path, given: Question) -> Iterator[str]:
    """A line for each request. given: what all share; with images, the prompt of each of them.
    Raises InputError.
    """
    if is_requests(source):
        if given.prompt:
            raise InputError(f"{source} brings its own prompts: drop --prompt")
        requests = request_file.gather(given, source)
        yield from (_line(request) for request in requests)
        return
    if not source.exists():
        raise InputError(
            f"{source} does not exist",
            hint="give a folder of images, a list of them, or a .jsonl file of requests",
        )
    if not given.prompt:
        raise InputError(
            f"{source} holds images, and there is no question about them",
            hint='ask one about each: --prompt "What is this?"',
        )
    given.checked()
    for number, file in enumerate(images(source), 1):
        yield _line(Request(replace(given, images=[file]), number, file))


def begun(lines: Iterator[str]) -> Iterator[str]:
    """The same lines, once there is a first one: what is refused is refused before OUT is made."""
    first = next(lines, None)
    return iter(()) if first is None else chain([first], lines)


def _line(request: Request) -> str:
    head = {"line": request.line, "id": request.id}
    if request.refused is not None:
        refused = request.refused
        return to_json(head | {"error": {"message": refused.message, "hint": refused.hint}})
    question = request.asked().checked()
    body = {
        "prompt": question.prompt,
        "images": [os.path.abspath(str(image)) for image in question.images],
        "max_tokens": question.max_tokens,
        "template": question.template,
        "stop": list(question.stop),
        "history": list(question.history),
    }
    return to_json(head | body)


def asked(data: dict[str, Any], given: Question) -> Request:
    """The inverse, of a line that `questions` wrote. given: what all requests share."""
    if "error" in data:
        reason = data["error"]
        refused = InputError(reason["message"], hint=reason["hint"])
        return Request(None, data["line"], data["id"], refused)
    names = ("prompt", "images", "max_tokens", "template", "stop", "history")
    question = replace(given, **{name: data[name] for name in names})
    return Request(question, data["line"], data["id"])


def files(source: Path) -> Iterator[str]:
    """A line for each image of a tower. Raises InputError."""
    if is_requests(source):
        raise InputError(
            f"{source} is a file of requests, and a vision tower by itself answers none",
            hint="name a folder, or a text file with one image a line",
        )
    for file in images(source):
        yield to_json({"file": os.path.abspath(file)})


def write(file: Path, lines: Iterator[str]) -> tuple[int, str]:
    """Write the lines; their number, and the SHA-256 of all."""
    digest, count = hashlib.sha256(), 0
    with file.open("wb") as stream:
        for line in lines:
            data = line.encode() + b"\n"
            stream.write(data)
            digest.update(data)
            count += 1
        stream.flush()
        os.fsync(stream.fileno())
    return count, digest.hexdigest()


def parts(file: Path, size: int) -> list[Part]:
    """The file in parts of `size` lines; the last one may have fewer."""
    found, offset, nbytes, count = list[Part](), 0, 0, 0
    with file.open("rb") as stream:
        for line in stream:
            nbytes += len(line)
            count += 1
            if count == size:
                found.append(Part(len(found), offset, nbytes))
                offset, nbytes, count = offset + nbytes, 0, 0
    return [*found, Part(len(found), offset, nbytes)] if count else found


def read(file: Path, part: Part) -> Sequence[dict[str, Any]]:
    """The lines of a part."""
    with file.open("rb") as stream:
        stream.seek(part.offset)
        return [json.loads(line) for line in stream.read(part.nbytes).splitlines()]
