"""Answers of the `run` verb: to one question, or to a file of requests, each on its own.

A request that fails does not stop the others. What was answered is kept as it comes: on the
terminal, and in a file with one JSON object a line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from edgevlm.engines.runtime.mask_files import Wanted, data
from edgevlm.engines.runtime.request_file import Request
from edgevlm.engines.runtime.session import Answer, Question, Session
from edgevlm.toolkit.errors import (
    InputError,
    OutputError,
    ToolkitError,
    printable,
    shortened,
)
from edgevlm.toolkit.strict import to_json
from edgevlm.toolkit.terminal.console import Console


def answer_one(session: Session, question: Question, console: Console, wanted: Wanted) -> None:
    """Answer and print: streaming text, or one JSON object; write masks. Raises ToolkitError."""
    answer = _stream(session, question, console)
    lines = wanted.write(answer, question)
    console.result(data(answer), ())
    for line in lines:
        console.note(line)
    _close([answer], session, console)


def check_output(output: Path | None, *, many: bool) -> None:
    """Raise InputError or OutputError where answers cannot be kept in `output`."""
    if output is None:
        return
    if not many:
        raise InputError("--output keeps the answers to a file of requests", hint="add --input")
    if output.exists():
        raise OutputError(f"{output} exists", hint="choose another name, or remove it")
    if not output.parent.is_dir():
        raise OutputError(f"{output.parent} is not a folder", hint="make it first")


def answer_all(
    session: Session, requests: list[Request], console: Console, output: Path | None
) -> None:
    """Answer every request that can be answered, print it, and append it to `output`.

    With --json one object at the end holds an entry per request, in order. Raises InputError at
    the end if a request failed; all failures are listed on stderr before.
    """
    entries, answers = [], []
    with _written(output) as file:
        for request in requests:
            entry, answer = _entry(session, request, console)
            entries.append(entry)
            answers += [answer] if answer else []
            if file is not None:
                file.write(to_json(entry) + "\n")
                file.flush()
    failed = [entry for entry in entries if "error" in entry]
    console.result({"answers": entries, "failed": len(failed)}, ())
    _close(answers, session, console)
    for entry in failed:
        print(_failure(entry), file=sys.stderr)
    if failed:
        raise InputError(
            f"{len(failed)} of {len(entries)} requests failed",
            hint="mend the lines named above; the other answers are complete",
        )


def _entry(
    session: Session, request: Request, console: Console
) -> tuple[dict[str, Any], Answer | None]:
    """What is kept of a request: the answer's fields, or `error` with message and hint."""
    entry: dict[str, Any] = {"line": request.line, "id": request.id}
    try:
        if request.refused is not None:
            raise request.refused
        assert request.question is not None
        answer = _stream(session, request.question, console)
        return entry | data(answer), answer
    except MemoryError:
        entry["error"] = {"message": "out of memory", "hint": "give a smaller image or prompt"}
    except ToolkitError as odd:
        entry["error"] = {"message": odd.message, "hint": odd.hint}
    console.stream("\n")
    return entry, None


def _stream(session: Session, question: Question, console: Console) -> Answer:
    reply = session.ask(question)
    for token in reply:
        console.stream(token.text)
    console.stream("\n")
    for note in reply.answer.notes:
        console.note(note)
    if reply.answer.token_ids and not reply.answer.text:
        console.note(
            f"the answer has no text: its {len(reply.answer.token_ids)} tokens stand for no "
            "characters, as random weights choose them (--json shows them)"
        )
    return reply.answer


@contextmanager
def _written(output: Path | None) -> Iterator[TextIO | None]:
    if output is None:
        yield None
        return
    try:
        file = output.open("x", encoding="ascii")
    except OSError as refused:
        raise OutputError(f"{output} cannot be written: {refused.strerror}") from None
    with file:
        yield file


def _failure(entry: Mapping[str, Any]) -> str:
    name = "" if entry["id"] is None else f" (id {shortened(to_json(entry['id']))})"
    hint = f" ({entry['error']['hint']})" if entry["error"]["hint"] else ""
    told = f"failed: line {entry['line']}{name}: {entry['error']['message']}{hint}"
    return printable(" ".join(told.split()))


def _close(answers: list[Answer], session: Session, console: Console) -> None:
    """The last answer's measures, for people."""
    if console.quiet or not answers:
        return
    last = answers[-1]
    first, latency = (last.timings_ms[k] for k in ("time_to_first_token", "inter_token_latency"))
    print(
        f"\n{last.prompt_tokens} tokens in ({last.image_tokens} image), {len(last.token_ids)} out; "
        f"loaded in {session.load_ms:.0f} ms, first token after {first:.0f} ms, "
        f"then {latency:.2f} ms a token; {last.peak_rss_mb:.0f} MB",
        file=sys.stderr,
    )
