"""Requests of the `run` verb: one from the command line, or many from a JSONL file."""

from __future__ import annotations

import codecs
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.engines.runtime.question import Question
from edgevlm.toolkit.errors import InputError, ToolkitError
from edgevlm.toolkit.strict import BOOKKEEPING, Reader

_MOST_BYTES = 1 << 27
_MOST_NESTED = 100  # an `id` is given back, and what writes it goes from level to level


@dataclass(frozen=True)
class Request:
    """One line of a request file: its question, or the reason why there is none.

    line: counted from 1; 0 for the command line. id: what the line calls itself, any JSON value.
    """

    question: Question | None
    line: int = 0
    id: Any = None
    refused: ToolkitError | None = None

    def asked(self) -> Question:
        """The question. Raises why there is none."""
        if self.question is None:
            raise self.refused or InputError("there is no question")
        return self.question


def gather(given: Question, file: Path | None) -> list[Request]:
    """What is to be answered. A line of `file` may set prompt, images, max_tokens, template, stop.

    Other settings come from the command line; image paths are relative to the file. A line that
    is no request is kept with its reason. Raises InputError where there is nothing to answer.
    """
    if file is None:
        if not given.prompt:
            raise InputError("there is no PROMPT", hint='edgevlm run ENGINE "What is this?"')
        return [Request(given)]
    if given.prompt or given.images:
        raise InputError("--input brings its own prompts and images: drop PROMPT and --image")
    given.checked()  # what is wrong with the command line is wrong with every request
    lines = _read_bytes(file).removeprefix(codecs.BOM_UTF8).split(b"\n")
    requests = [
        _request(line, number, file, given) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not requests:
        raise InputError(f"{file} holds no request")
    return requests


def _read_bytes(file: Path) -> bytes:
    """A file's content; a pipe's too, but a device may never end."""
    try:
        with file.open("rb") as opened:
            data = opened.read(_MOST_BYTES + 1)
    except OSError as refused:
        raise InputError(f"{file} cannot be read: {refused.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise InputError(
            f"{file} has more than {_MOST_BYTES >> 20} MB", hint="split it into several files"
        )
    return data


def _request(line: bytes, number: int, file: Path, given: Question) -> Request:
    where, name = f"{file} line {number}", None
    try:
        data = _object(line, where)
        name = data.get("id")
        return Request(_question(data, where, given, file.parent), number, name)
    except ToolkitError as refused:
        return Request(None, number, name, refused)


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        data = json.loads(line.decode(), parse_constant=_refused, parse_float=_finite)
    except UnicodeDecodeError as odd:
        raise InputError(f"{where} cannot be read as UTF-8: {odd.reason}") from None
    except (ValueError, RecursionError) as broken:
        raise InputError(f"{where} is not JSON: {broken}") from None
    if not isinstance(data, dict):
        raise InputError(f"{where} is not a JSON object")
    if _nested(data) > _MOST_NESTED:
        raise InputError(f"{where} is JSON nested more than {_MOST_NESTED} deep")
    return data


def _nested(data: Any) -> int:
    """How many lists and objects are within one another, as far as _MOST_NESTED and one more."""
    level, count = [data], 0
    while level and count <= _MOST_NESTED:
        count += 1
        inner = (x for outer in level for x in (outer.values() if type(outer) is dict else outer))
        level = [x for x in inner if type(x) in (dict, list)]
    return count


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    """A number; one that no float holds would become infinite."""
    if not math.isfinite(float(digits)):
        raise ValueError(f"{digits:.40} is beyond the range of numbers")
    return float(digits)


def _question(data: dict[str, Any], where: str, given: Question, folder: Path) -> Question:
    keys = "prompt (or messages), images (or image), max_tokens, template, stop, id"
    try:
        bookkeeping = sorted(BOOKKEEPING & set(data))  # keys that a Reader skips
        if bookkeeping:
            raise InputError(f"{where}: {', '.join(bookkeeping)} cannot be set for one request")
        question = _read(Reader(data, where), given, folder)
    except ToolkitError as odd:
        raise InputError(odd.message, hint=f"a request has the keys: {keys}") from None
    try:
        question.checked()
    except ToolkitError as odd:
        raise InputError(f"{where}: {odd.message}", hint=odd.hint) from None
    return question


def _read(r: Reader, given: Question, folder: Path) -> Question:
    prompt, history = _turns(r)
    images, single = _texts(r, "images"), r.optional("image", str)
    if single is not None and images:
        raise InputError(f"{r.where} has both image and images")
    files = [str(folder / name) for name in (images if single is None else [single])]
    max_tokens = r.count("max_tokens", given.max_tokens)
    template, stop = r.take("template", str, given.template), _texts(r, "stop")
    r.skip("id")
    r.done()
    return replace(
        given,
        history=history,
        prompt=prompt,
        images=files,
        max_tokens=max_tokens,
        template=template,
        stop=[*given.stop, *stop],
    )


def _texts(r: Reader, key: str) -> list[str]:
    texts = r.take(key, list, [])
    if not all(isinstance(item, str) for item in texts):
        raise InputError(f"{r.where}: {key} = {texts!r}, expected a list of texts")
    return texts


def _turns(r: Reader) -> tuple[str, list[str]]:
    """The question and the turns before it, from "prompt" or from "messages" as chat APIs have."""
    if not r.has("messages"):
        return r.take("prompt", str), []
    turns = []
    for number, message in enumerate(r.take("messages", list)):
        role = "assistant" if number % 2 else "user"
        if not isinstance(message, dict) or message.get("role") != role:
            raise InputError(f"{r.where}: messages[{number}] is not of role {role!r}")
        if not isinstance(message.get("content"), str):
            raise InputError(f"{r.where}: messages[{number}] has no text as its content")
        turns.append(message["content"])
    if len(turns) % 2 == 0:
        raise InputError(f"{r.where}: messages do not end with the user's")
    return turns[-1], turns[:-1]
