"""Requests of the `run` verb: one from the command line, or many from a JSONL file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgevlm.engines.runtime.session import Answer, Question, Session
from edgevlm.toolkit.errors import InputError, ToolkitError
from edgevlm.toolkit.inert_keys import BOOKKEEPING
from edgevlm.toolkit.strict import Reader, to_plain
from edgevlm.toolkit.terminal.console import Console


def gather(given: Question, file: Path | None) -> list[Question]:
    """The questions to answer. A line of `file` may set prompt, images, max_tokens, template.

    Other settings come from the command line; image paths are relative to the file.
    """
    if file is None:
        if not given.prompt:
            raise InputError("there is no PROMPT", hint='edgevlm run ENGINE "What is this?"')
        return [given]
    if given.prompt or given.images:
        raise InputError("--input brings its own prompts and images: drop PROMPT and --image")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as refused:
        raise InputError(f"{file} cannot be read: {refused.strerror}") from None
    except UnicodeDecodeError as odd:
        raise InputError(f"{file} cannot be read as UTF-8: {odd.reason}") from None
    questions = [
        _question(line, f"{file} line {number}", given, file.parent)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not questions:
        raise InputError(f"{file} holds no request")
    return questions


def _question(line: str, where: str, given: Question, folder: Path) -> Question:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as broken:
        raise InputError(f"{where} is not JSON: {broken}") from None
    if not isinstance(data, dict):
        raise InputError(f"{where} is not a JSON object")
    keys = "prompt (or messages), images (or image), max_tokens, template, stop"
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


def answer_all(
    session: Session, questions: list[Question], console: Console, *, many: bool
) -> None:
    """Answer and print: streaming text, or one JSON object (`answers` holds many)."""
    answers = []
    for question in questions:
        reply = session.ask(question)
        for token in reply:
            console.stream(token.text)
        answers.append(reply.answer)
        console.stream("\n")
        for note in reply.answer.notes:
            console.note(note)
    if console.as_json:
        data: Any = {"answers": [_data(a) for a in answers]} if many else _data(answers[0])
        console.result(data, ())
    elif not console.quiet:
        print(_closing(answers, session.load_ms), file=sys.stderr)


def _data(answer: Answer) -> Mapping[str, Any]:
    data: Mapping[str, Any] = to_plain(answer)
    return data


def _closing(answers: list[Answer], load_ms: float) -> str:
    last = answers[-1]
    first, latency = (last.timings_ms[k] for k in ("time_to_first_token", "inter_token_latency"))
    return (
        f"\n{last.prompt_tokens} tokens in ({last.image_tokens} image), {len(last.token_ids)} out; "
        f"loaded in {load_ms:.0f} ms, first token after {first:.0f} ms, "
        f"then {latency:.2f} ms a token; {last.peak_rss_mb:.0f} MB"
    )
