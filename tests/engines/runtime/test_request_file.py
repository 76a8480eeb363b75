"""Requests from the command line and from JSONL files, in every form, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgevlm.engines.runtime.request_file import Request, gather
from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.runtime.session import Question
from edgevlm.toolkit.errors import InputError

GIVEN = Question("", (), 99, Sampling(0.7, seed=3), "vicuna_v1", ["END"])


def read(folder: Path, *lines: Any, raw: bytes | None = None) -> list[Question]:
    file = folder / "requests.jsonl"
    text = "\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines)
    file.write_bytes(text.encode() if raw is None else raw)
    return [asked(request) for request in gather(GIVEN, file)]


def asked(request: Request) -> Question:
    if request.refused is not None:
        raise request.refused
    assert request.question is not None
    return request.question


def test_one_question_from_the_command_line() -> None:
    question = Question("What?", ["a.png"])
    assert gather(question, None) == [Request(question)]
    with pytest.raises(InputError, match="no PROMPT"):
        gather(Question(""), None)


def test_the_command_line_and_a_file_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "r").write_text('{"prompt": "Q"}')
    for given in (Question("Q"), Question("", ["a.png"])):
        with pytest.raises(InputError, match="drop PROMPT and --image"):
            gather(given, tmp_path / "r")


def test_what_a_line_leaves_out_comes_from_the_command_line(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {"prompt": "Q"})
    assert (found.prompt, list(found.checked().images), list(found.history)) == ("Q", [], [])
    assert (found.max_tokens, found.template, list(found.stop)) == (99, "vicuna_v1", ["END"])
    assert found.sampling == GIVEN.sampling


def test_what_a_line_says_goes_first(tmp_path: Path) -> None:
    line = {"id": 7, "prompt": "Q", "max_tokens": 5, "template": "none", "stop": ["x", "y"]}
    (found,) = read(tmp_path, line)
    assert (found.max_tokens, found.template, list(found.stop)) == (5, "none", ["END", "x", "y"])


def test_images_stand_beside_the_file(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {"prompt": "Q", "image": "a.png"},
        {"prompt": "Q", "images": ["b.png", "sub/c.png"]},
        {"prompt": "Q", "images": ["/abs/d.png"]},
        {"prompt": "Q", "images": []},
        {"prompt": "Q", "image": None},
    )
    assert [list(map(str, q.checked().images)) for q in found] == [
        [str(tmp_path / "a.png")],
        [str(tmp_path / "b.png"), str(tmp_path / "sub/c.png")],
        ["/abs/d.png"],
        [],
        [],
    ]


def test_messages_are_a_history_and_a_question(tmp_path: Path) -> None:
    def request(*turns: tuple[str, str]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    one, three = read(
        tmp_path,
        request(("user", "Q")),
        request(("user", "Q"), ("assistant", "A"), ("user", "R")),
    )
    assert (one.prompt, list(one.history)) == ("Q", [])
    assert (three.prompt, list(three.history)) == ("R", ["Q", "A"])


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    odd = "a\u2028b\u0085c\x0cd"
    found = read(tmp_path, {"prompt": odd}, "", "   ", {"prompt": "second"})
    assert [q.prompt for q in found] == [odd, "second"]
    windows = read(tmp_path, raw=b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [q.prompt for q in windows] == ["a", "b"]


MESSAGE = {"role": "user", "content": "Q"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ({}, "lacks the key 'prompt'"),
        ({"prompt": 5}, "prompt = 5, expected str"),
        ({"prompt": "Q", "max_tokens": True}, "max_tokens"),
        ({"prompt": "Q", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "Q", "images": "a.png"}, "images"),
        ({"prompt": "Q", "images": [5]}, "images"),
        ({"prompt": "Q", "image": ["a.png"]}, "image"),
        ({"prompt": "Q", "image": "a.png", "images": ["b.png"]}, "image.*images"),
        ({"prompt": "Q", "stop": "x"}, "stop"),
        ({"prompt": "Q", "stop": [None]}, "stop"),
        ({"prompt": "Q", "surprise": 1}, "surprise"),
        ({"prompt": "Q", "temperature": 0.5}, "temperature"),
        ({"prompt": "Q", "top_p": 0.5}, "top_p"),
        ({"prompt": "Q", "max_length": 5}, "max_length"),
        ({"prompt": "Q", "messages": [MESSAGE]}, "prompt"),
        ({"messages": []}, "do not end with the user's"),
        ({"messages": [MESSAGE, {"role": "assistant", "content": "A"}]}, "do not end"),
        ({"messages": [{"role": "system", "content": "S"}, MESSAGE]}, r"messages\[0\]"),
        ({"messages": [MESSAGE, MESSAGE, MESSAGE]}, r"messages\[1\]"),
        ({"messages": ["Q"]}, r"messages\[0\]"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].*content"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].*content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            r"messages\[0\].*content",
        ),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, line: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as refused:
        read(tmp_path, {"prompt": "fine"}, line)
    assert "requests.jsonl line 2" in refused.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        gather(GIVEN, tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        gather(GIVEN, tmp_path)
    with pytest.raises(InputError, match="cannot be read.*UTF-8"):
        read(tmp_path, raw=b'{"prompt": "\xff"}')
    with pytest.raises(InputError, match=r"no requests|requests\.jsonl"):
        read(tmp_path, "", "  ")


def test_a_line_that_is_no_request_leaves_the_others(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    bad = [b"{", b'{"prompt": 3, "id": [7]}', b'{"prompt": "\xff"}', b""]
    lines = [b'{"prompt": "a", "id": "x"}', *bad, b'{"prompt": "b", "id": 0}']
    file.write_bytes(b"\n".join(lines))
    found = gather(GIVEN, file)
    assert [(r.line, r.id) for r in found] == [(1, "x"), (2, None), (3, [7]), (4, None), (6, 0)]
    assert [r.question.prompt for r in found if r.question] == ["a", "b"]
    for request, reason in zip(found[1:4], ("is not JSON", "prompt = 3", "as UTF-8"), strict=True):
        assert request.refused is not None
        assert f"line {request.line}" in request.refused.message
        assert reason in request.refused.message


def test_a_wrong_command_line_fails_before_any_request(tmp_path: Path) -> None:
    (tmp_path / "r").write_text('{"prompt": "Q"}')
    with pytest.raises(InputError, match="--max-tokens 0"):
        gather(Question("", max_tokens=0), tmp_path / "r")
