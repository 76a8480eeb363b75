"""Requests: lines of a request file, asked of one session as `run --input --json` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from random import Random
from typing import Any

from edgevlm.engines.runtime import batch, request_file
from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.errors import ToolkitError
from edgevlm.toolkit.terminal.console import Console
from tests.fuzz.frame import REFUSED, Place, Violation, refused
from tests.fuzz.mutations import TEXTS, changed_bytes, changed_json
from tests.refusals import IMAGE

_MOST_TOKENS = 4
_TEMPLATES = ("auto", "auto", "none", "llava_v0", "mpt", "plain", "llama_2", "chatml", "nothing")
_PIECES = (
    "<image>", "</s>", "<s>", "<unk>", "<|im_end|>", "<|im_start|>", "[INST]", "USER:", "###",
    "\x1f", "\0", "\u202e", "▁", "\n", "\t", "\x1b[31m", "\ufffd", "\u0301" * 5, "🙂", "日本",
    "ß", "<0x0A>", " " * 20, "word " * 300, "a" * 3000, "\ud800",
)  # fmt: skip


@dataclass(frozen=True)
class Lines:
    """A request file's bytes, and the sampling of the command line."""

    data: bytes
    sampling: Sampling = Sampling()


class Requests:
    """Request files, answered by a session that is open all the time."""

    name = "requests"
    share = 4

    def __init__(self, place: Place) -> None:
        self._file = place.work / "requests.jsonl"
        self._engine = place.ready / "engine-cpu"
        self._session: Session | None = None
        self._fixed: tuple[int, ...] = ()

    def seeds(self) -> Mapping[str, Lines]:
        """Requests that are right, and past findings."""
        right: list[dict[str, Any]] = [
            {"prompt": "What is this?", "images": [str(IMAGE)], "max_tokens": 2, "id": 7},
            {"prompt": "<image>\nWhat?", "image": str(IMAGE), "template": "none", "stop": ["e"]},
            {
                "messages": [
                    {"role": "user", "content": "Hello"},
                    {"role": "assistant", "content": "Hi"},
                    {"role": "user", "content": "What?"},
                ],
                "id": {"a": [1]},
            },
            {"prompt": "hello " * 40, "max_tokens": 1, "template": "llava_v0"},
        ]
        found = {f"right {n}": json.dumps(line).encode() for n, line in enumerate(right)}
        found |= {f"piece {n}": _line(f"a {text} b") for n, text in enumerate(_PIECES)}
        found |= {
            "half a character in an id": _line("a", id="\udc80"),
            "no number in an id": b'{"prompt": "a", "id": [NaN, Infinity, -Infinity, 1e999]}',
            "digits in an id": b'{"prompt": "a", "id": ' + b"7" * 4300 + b"}",
            "too many digits": b'{"prompt": "a", "id": ' + b"7" * 5000 + b"}",
            "deep": b'{"prompt": "a", "id": ' + b"[" * 900 + b"]" * 900 + b"}",
            "deeper": b'{"prompt": "a", "id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "long name": _line("a", image="x" * 5000),
            "name with a zero": _line("a", image="a\0b"),
            "folder": _line("a", image="."),
            "device": _line("a", image="/dev/zero"),
            "latin-1": b'{"prompt": "caf\xe9"}',
            "utf-16": json.dumps({"prompt": "a"}).encode("utf-16"),
            "many tokens": b'{"prompt": "a", "max_tokens": 1' + b"0" * 400 + b"}",
        }
        return {name: Lines(data) for name, data in found.items()}

    def mutate(self, rng: Random, seed: Lines) -> Lines:
        """Bytes, values or texts changed; sometimes drawn instead of greedy."""
        kind, sampling = rng.randrange(4), Sampling()
        if rng.random() < 0.3:
            sampling = Sampling(
                rng.choice((1e-320, 0.7, 1e308)), rng.choice((0, 1, 5, 10**30)), 0.9, 3
            )
        try:
            data = json.loads(seed.data)
        except (ValueError, RecursionError):
            kind = 0
        if kind == 0:
            return Lines(changed_bytes(rng, seed.data), sampling)
        if kind == 1 and isinstance(data, dict):
            data["prompt"] = _text(rng)
            data.pop("messages", None)
            data["template"] = rng.choice(_TEMPLATES)
            return Lines(json.dumps(data).encode(), sampling)
        return Lines(changed_json(rng, data).encode(), sampling)

    def check(self, case: Lines) -> str:
        """Each line is answered or refused, in JSON that every parser reads; the session stays."""
        self._file.write_bytes(case.data)
        out, err = StringIO(), StringIO()
        given = Question("", (), _MOST_TOKENS, case.sampling)
        with redirect_stdout(out), redirect_stderr(err):
            try:
                requests = [_short(r) for r in request_file.gather(given, self._file)]
                batch.answer_all(self._opened(), requests, Console(quiet=True, as_json=True), None)
            except ToolkitError as error:
                outcome = refused(error)
            else:
                outcome = "answered"
        if outcome == REFUSED and not out.getvalue():
            return outcome
        told = parsed(out.getvalue())
        for entry in told["answers"]:
            self._check_entry(entry)
        self._check_same()
        return outcome

    def _opened(self) -> Session:
        if self._session is None:
            self._session = Session.open(self._engine, threads=1)
            self._fixed = self._answer()
        return self._session

    def _answer(self) -> tuple[int, ...]:
        assert self._session is not None
        return self._session.answer(Question("What is in it?", [IMAGE], 3)).token_ids

    def _check_entry(self, entry: dict[str, Any]) -> None:
        if "error" in entry:
            refused(ToolkitError(entry["error"]["message"], hint=entry["error"]["hint"]))
        elif not 1 <= len(entry["token_ids"]) <= _MOST_TOKENS:
            raise Violation(f"{len(entry['token_ids'])} tokens")

    def _check_same(self) -> None:
        """What a session answers does not depend on what it was asked before."""
        if self._answer() != self._fixed:
            raise Violation(f"the session answers {self._answer()}, at first {self._fixed}")


def parsed(out: str) -> dict[str, Any]:
    """The object that --json printed. Raises Violation unless it is one line of plain JSON."""

    def never(name: str) -> float:
        raise Violation(f"{name} in JSON")

    if not out.isascii() or out.count("\n") != 1 or not out.endswith("\n"):
        raise Violation(f"not one line of ASCII: {out!a:.300}")
    data: dict[str, Any] = json.loads(out, parse_constant=never)
    return data


def _short(request: request_file.Request) -> request_file.Request:
    """The same with a few tokens at most, whatever it asks for."""
    question = request.question
    if question is None or question.max_tokens <= _MOST_TOKENS:
        return request
    fields = {**vars(question), "max_tokens": _MOST_TOKENS}
    return request_file.Request(Question(**fields), request.line, request.id)


def _line(prompt: str, **more: Any) -> bytes:
    return json.dumps({"prompt": prompt, **more}).encode()


def _text(rng: Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(chr(rng.randrange(1, 0x110000)) for _ in range(rng.randrange(1, 60)))
    if kind == 1:
        return "".join(chr(rng.randrange(160)) for _ in range(rng.randrange(1, 60)))
    if kind == 2:
        return " ".join(rng.choice((*_PIECES, "hello", "what")) for _ in range(rng.randrange(1, 8)))
    return rng.choice(TEXTS) * rng.choice((1, 2, 50))
