"""Questions that are refused: prompts, options, request files, and options of profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.refusals import IMAGE, check_contract, edgevlm, refuses

RUN: list[tuple[tuple[object, ...], str]] = [
    ((), "there is no PROMPT"),
    (("",), "there is no PROMPT"),
    (("What?", "--max-tokens", 0), "--max-tokens 0"),
    (("What?", "--max-tokens", -3), "--max-tokens -3"),
    (("What?", "--temperature", -1), "--temperature -1.0"),
    (("What?", "--temperature", "nan"), "--temperature nan"),
    (("What?", "--temperature", "inf"), "--temperature inf"),
    (("What?", "--temperature", 1, "--top-p", 2), "--top-p 2.0"),
    (("What?", "--temperature", 1, "--top-p", 0), "--top-p 0.0"),
    (("What?", "--temperature", 1, "--top-p", "nan"), "--top-p nan"),
    (("What?", "--temperature", 1, "--top-k", -1), "--top-k -1"),
    (("What?", "--temperature", 1, "--seed", -1), "--seed -1"),
    (("What?", "--top-k", 5), "--top-k and --top-p have no effect"),
    (("What?", "--threads", -1), "--threads -1"),
    (("What?", "--template", "vicuna_v9"), "vicuna_v9"),
    (("<image> and <image>?", "--image", IMAGE), "2 image slot(s) and 1 image(s)"),
    (("<image>?", "--image", IMAGE, "--image", IMAGE), "1 image slot(s) and 2 image(s)"),
    (("<image>?",), "1 image slot(s) and 0 image(s)"),
    (("no slot", "--image", IMAGE, "--template", "none"), "0 image slot(s) and 1 image(s)"),
    (("word " * 3000,), "context is 2048"),
    (("What?", "--input", IMAGE), "--input brings its own prompts"),
]


@pytest.mark.parametrize("case", RUN, ids=lambda c: " ".join(str(w)[-20:] for w in c[0]))
def test_a_question_without_meaning_is_refused(
    case: tuple[tuple[object, ...], str], ready: Path, tmp_path: Path
) -> None:
    words, reason = case
    assert reason in refuses(tmp_path, "run", ready / "engine-cpu", *words, "--quiet")[0]


def test_a_long_prompt_is_counted_and_a_way_out_named(ready: Path, tmp_path: Path) -> None:
    words = ["word " * 3000, "--image", IMAGE, "--quiet"]
    error, hint = refuses(tmp_path, "run", ready / "engine-cpu", *words)
    assert "(36 of images)" in error
    assert "shorten the prompt" in hint


def test_sampling_next_to_zero_is_greedy(ready: Path) -> None:
    ask = ("run", ready / "engine-cpu", "What?", "--max-tokens", 6, "--json")
    greedy = json.loads(edgevlm(*ask).out)["token_ids"]
    for temperature in ("1e-300", "5e-324"):
        drawn = edgevlm(*ask, "--temperature", temperature)
        assert json.loads(drawn.out)["token_ids"] == greedy


USAGE: list[tuple[object, ...]] = [
    ("run",),
    ("run", "engine", "What?", "--max-tokens", "many"),
    ("run", "engine", "What?", "--temperature", "hot"),
    ("run", "engine", "What?", "--no-such-option"),
    ("sprint",),
    ("export", "one"),
    ("profile", "engine", "--runs", "1.5"),
]


@pytest.mark.parametrize("words", USAGE, ids=lambda w: " ".join(map(str, w)))
def test_a_usage_error_exits_2(words: tuple[object, ...], tmp_path: Path) -> None:
    _, hint = refuses(tmp_path, *words, code=2)
    assert "--help" in hint


# -- files of requests -------------------------------------------------------------------------

GOOD = b'{"prompt": "What?"}\n'
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "holds no request"),
    "blank": (b"\n\n  \n", "holds no request"),
    "broken": (GOOD + b'{"prompt": \n', "line 2 is not JSON"),
    "no object": (GOOD + b"[1]\n", "line 2 is not a JSON object"),
    "latin-1": (b'{"prompt": "caf\xe9"}\n', "cannot be read"),
    "deep": (GOOD + b"[" * 100_000 + b"\n", "line 2 is not JSON"),
    "unknown key": (b'{"prompt": "What?", "beams": 4}\n', "line 1 has unknown keys: beams"),
    "NaN": (b'{"prompt": "What?", "id": NaN}\n', "NaN is no number of JSON"),
    "infinite": (b'{"prompt": "What?", "id": 1e999}\n', "beyond the range of numbers"),
    "nested id": (b'{"prompt": "?", "id": ' + b"[" * 500 + b"]" * 500 + b"}\n", "100 deep"),
    "half a character": (b'{"prompt": "\\ud800"}\n', "half a character"),
    "no prompt": (b'{"image": "a.png"}\n', "line 1 lacks the key 'prompt'"),
    "a number": (b'{"prompt": 3}\n', "prompt = 3, expected str"),
    "images": (b'{"prompt": "What?", "images": [3]}\n', "images = [3]"),
    "image twice": (b'{"prompt": "?", "image": "a", "images": ["b"]}\n', "both image and images"),
    "stop": (b'{"prompt": "What?", "stop": [null]}\n', "stop = [None]"),
    "tokens": (b'{"prompt": "What?", "max_tokens": 0}\n', "max_tokens = 0"),
    "template": (b'{"prompt": "What?", "template": "v9"}\n', "v9"),
    "no image": (b'{"prompt": "What?", "image": "none.png"}\n', "none.png does not exist"),
    "roles": (b'{"messages": [{"role": "system", "content": "x"}]}\n', "not of role 'user'"),
    "parts": (
        b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}\n',
        "messages[0] has no text",
    ),
    "ends": (b'{"messages": []}\n', "do not end with the user's"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_request_file_is_refused_by_line(case: str, ready: Path, tmp_path: Path) -> None:
    data, reason = FILES[case]
    file = tmp_path / "requests.jsonl"
    file.write_bytes(data)
    ask = ("run", ready / "engine-cpu", "--input", file, "--json")
    if reason == "holds no request":
        assert reason in refuses(tmp_path, *ask)[0]
        return
    ran = edgevlm(*ask)
    assert ran.code == 1
    error, hint = check_contract(ran.err)
    entries = json.loads(ran.out)["answers"]
    assert error == f"1 of {len(entries)} requests failed"
    assert hint
    assert reason in entries[-1]["error"]["message"]
    (listed,) = [line for line in ran.err.splitlines() if line.startswith("failed: line ")]
    assert reason in listed
    assert all("text" in entry for entry in entries[:-1])


GOOD_AND_BAD: list[dict[str, Any]] = [
    {"prompt": "What is 1?", "id": "q1"},
    {"prompt": "What is 2?", "image": "cut.png", "id": {"n": 2}},
    {"prompt": "<image> What is 3?", "id": "\ud800"},
    {"prompt": "What is 4?", "image": str(IMAGE), "id": 4},
]


def test_a_batch_answers_what_it_can(ready: Path, tmp_path: Path) -> None:
    file, kept, engine = tmp_path / "r.jsonl", tmp_path / "kept.jsonl", ready / "engine-cpu"
    (tmp_path / "cut.png").write_bytes(IMAGE.read_bytes()[:300])
    file.write_text("\n".join(map(json.dumps, GOOD_AND_BAD)))
    ask = ("run", engine, "--input", file, "--max-tokens", 4)
    ran = edgevlm(*ask, "--json", "--output", kept)
    assert ran.code == 1
    given = json.loads(ran.out)
    entries = given["answers"]
    assert given["failed"] == 2
    assert [(e["line"], e["id"], "error" in e) for e in entries] == [
        (1, "q1", False), (2, {"n": 2}, True), (3, "\ud800", True), (4, 4, False)
    ]  # fmt: skip
    assert [json.loads(line) for line in kept.read_text().splitlines()] == entries
    assert 'failed: line 2 (id {"n": 2}): image ' in ran.err
    assert "failed: line 3 (id " in ran.err
    alone = edgevlm("run", engine, "What is 4?", "--image", IMAGE, "--max-tokens", 4, "--json")
    assert json.loads(alone.out)["token_ids"] == entries[3]["token_ids"]
    text = edgevlm(*ask)
    assert text.code == 1
    assert text.out == f"{entries[0]['text']}\n\n\n{entries[3]['text']}\n"
    refused = edgevlm(*ask, "--output", kept)
    assert (refused.code, refused.out) == (1, "")
    assert f"{kept} exists" in refused.err


def test_a_killed_batch_keeps_its_answers(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgevlm.engines.runtime.session import Session

    file, kept, whole, seen = tmp_path / "r", tmp_path / "kept", Session.ask, []
    file.write_text('{"prompt": "a", "id": "x"}\n{"prompt": "b"}\n')

    def ask(self: Session, question: Any) -> Any:
        if question.prompt == "b":
            seen.append(kept.read_text())
            raise KeyboardInterrupt
        return whole(self, question)

    monkeypatch.setattr(Session, "ask", ask)
    words = ("--input", file, "--output", kept, "--max-tokens", 2)
    assert edgevlm("run", ready / "engine-cpu", *words).code == 130
    assert json.loads(seen[0])["id"] == "x"
    assert kept.read_text() == seen[0]


def test_an_output_that_cannot_be_is_refused(ready: Path, tmp_path: Path) -> None:
    file = tmp_path / "r"
    file.write_text('{"prompt": "a"}')
    run = ("run", ready / "engine-cpu")
    assert "--input" in refuses(tmp_path, *run, "What?", "--output", tmp_path / "o")[1]
    for output, reason in ((tmp_path / "no/o", "is not a folder"), (file, "exists")):
        assert reason in refuses(tmp_path, *run, "--input", file, "--output", output)[0]


def test_a_request_file_that_is_none_is_refused(ready: Path, tmp_path: Path) -> None:
    for file in (tmp_path / "none.jsonl", tmp_path, Path("/dev/zero")):
        assert str(file) in refuses(tmp_path, "run", ready / "engine-cpu", "--input", file)[0]


def test_a_line_separator_within_a_request_is_text(ready: Path, tmp_path: Path) -> None:
    request: dict[str, Any] = {"prompt": "one\u2028two\x85three", "max_tokens": 1}
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps(request, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert edgevlm("run", ready / "engine-cpu", "--input", file, "--json").code == 0


# -- profile and inspect -----------------------------------------------------------------------

PROFILE: list[tuple[tuple[object, ...], str]] = [
    (("--runs", 0), "--runs 0"),
    (("--runs", -1), "--runs -1"),
    (("--warmup", -1), "--warmup -1"),
    (("--max-tokens", 1), "--max-tokens 1"),
    (("--prompt-tokens", 0), "--prompt-tokens 0"),
    (("--prompt-tokens", -9), "--prompt-tokens -9"),
    (("--prompt-tokens", 5000), "context of 2048"),
    (("--threads", -1), "--threads -1"),
    (("--layers", -1), "--layers -1"),
    (("--image", "none.png"), "none.png does not exist"),
    (("--compare", "nowhere"), "nowhere is not an engine"),
    (("--html", "nowhere/page.html"), "nowhere/page.html"),
    (("--trace", "/etc/hostname/t.json"), "/etc/hostname/t.json"),
]


@pytest.mark.parametrize("case", PROFILE, ids=lambda c: " ".join(map(str, c[0])))
def test_a_profile_that_cannot_be_measured_is_refused_before_it_is(
    case: tuple[tuple[object, ...], str], ready: Path, tmp_path: Path
) -> None:
    words, reason = case
    ran = edgevlm("profile", ready / "engine-cpu", *words)
    assert reason in refuses(tmp_path, "profile", ready / "engine-cpu", *words)[0]
    assert "run 1:" not in ran.err


THINGS: dict[str, tuple[bytes | None, str]] = {
    "nothing": (None, "does not exist"),
    "text": (b"hello", "is no checkpoint, bundle, engine or profile"),
    "broken.json": (b"{", "is not valid JSON"),
    "list.json": (b"[]", "expected an object"),
    "other.json": (b"{}", "is not a profile"),
    "half.json": (b'{"time_to_first_token_ms": 1}', "is not a profile"),
}


@pytest.mark.parametrize("name", THINGS)
def test_inspecting_nonsense_is_refused(name: str, tmp_path: Path) -> None:
    data, reason = THINGS[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    error, _ = refuses(tmp_path, "inspect", tmp_path / name)
    assert reason in error
    assert str(tmp_path / name) in error


def test_inspecting_an_empty_folder_or_an_endless_name_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in refuses(tmp_path, "inspect", tmp_path)[0]
    assert "x" * 300 in refuses(tmp_path, "inspect", "x" * 300)[0]
