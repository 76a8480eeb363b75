"""`edgevlm eval` on a tiny engine: what it finds, what it records, what it refuses."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import Question, Session
from edgevlm.engines.evaluation import agreement, other, perplexity
from edgevlm.engines.evaluation.tasks import TASKS, Request
from edgevlm.toolkit.text.prompts import PromptSequence
from tests.conftest import ROOT
from tests.refusals import IMAGE, check_contract, edgevlm
from tests.sealing import edit_sealed

TEXT = "The quick brown fox jumps over the lazy dog. " * 12


def evaluated(*words: object) -> Any:
    ran = edgevlm("eval", *words, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def lines(file: Path, *entries: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


@pytest.fixture
def engine(ready: Path) -> Path:
    return ready / "engine-cpu"


def test_an_engine_agrees_with_its_reference(engine: Path) -> None:
    found = evaluated(engine, "agreement", "--against", "reference", "--limit", 2)
    assert (found["prompts"], found["exact"], found["same_prefix"], found["top1"]) == (2, 1, 1, 1)
    assert found["kl_max"] < 1e-6
    assert found["tokens"] > 2
    assert found["provenance"]["options"]["max_tokens"] == agreement.MAX_TOKENS


def test_disagreement_is_counted_once_and_by_position(engine: Path) -> None:
    """Two prompts in place of two engines: what differs is known without the module's help."""
    with Session.open(engine, threads=1) as session:
        questions = [Question(text, str(IMAGE), 6) for text in ("What is this?", "Name it.")]
        tokens = [session.answer(question).token_ids for question in questions]
        logits = [agreement._following(session, question, tokens[0]) for question in questions]
    first, second = map(other.log_probabilities, logits)
    assert [int(row.argmax()) for row in first] == list(tokens[0])  # greedy, without penalties
    kl, same = other.divergence(first, second)
    p = np.exp(first.astype(np.float64))
    q = np.exp(second.astype(np.float64))
    np.testing.assert_allclose(kl, (p * np.log(p / q)).sum(-1), rtol=1e-3, atol=1e-6)
    assert kl.min() > 0
    assert same.tolist() == [bool(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True)]


def test_perplexity_is_that_of_the_positions_alone(engine: Path, tmp_path: Path) -> None:
    """The pieces in which a window is read change nothing: decoding gives the same."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    found = evaluated(engine, "perplexity", "--text", text, "--window", 16, "--limit", 3)
    assert found["tokens"] == 45
    losses = []
    with Session.open(engine, threads=1) as session:
        ids = session.tokenizer.encode(TEXT, special=False)
        state = session.new_state()
        for start in (0, 16, 32):
            for at in range(15):
                logits = session.decode(ids[start + at], at, state).astype(np.float64)
                losses.append(np.log(np.exp(logits).sum()) - logits[ids[start + at + 1]])
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_a_window_longer_than_a_piece_scores_alike(engine: Path, monkeypatch: Any) -> None:
    from edgevlm.engines.runtime import session as module

    with Session.open(engine, threads=1) as session:
        ids = np.asarray(session.tokenizer.encode(TEXT, special=False)[:40], np.int64)
        sequence = PromptSequence(ids[None], np.full((1, 40), -1, np.int64))
        whole = np.concatenate([p.copy() for p in perplexity._pieces(session, sequence)])
        monkeypatch.setattr(module, "_SCORED", 7)
        pieces = [p.copy() for p in perplexity._pieces(session, sequence)]
    assert [len(piece) for piece in pieces] == [7, 7, 7, 7, 7, 5]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-4)


def test_perplexity_beside_another_engine(engine: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ("perplexity", "--text", text, "--window", 16, "--against", engine)
    found = evaluated(engine, *words)
    assert (found["kl"], found["top1"]) == (0, 1)
    assert found["perplexity"] == found["perplexity_against"]
    record = found["provenance"]
    assert record["files"] == {str(text): sha256(text.read_bytes()).hexdigest()}
    assert record["against_sha256"] == record["engine_sha256"]
    assert record["options"]["window"] == 16
    for key in ("bundle_sha256", "target", "precision", "edgevlm", "backend", "processor", "began"):
        assert record[key], key


def test_samples_are_asked_and_scored(engine: Path, tmp_path: Path) -> None:
    with Session.open(engine, threads=1) as session:
        prompt = "What is this?\nAnswer the question using a single word or phrase."
        answer = session.answer(Question(prompt, str(IMAGE), 5)).text
    sample = {"image": IMAGE.name, "question": "What is this?"}
    data = lines(
        tmp_path / "vqa.jsonl",
        sample | {"answer": answer, "question_id": 7},
        sample | {"answers": ["nothing like it"] * 10},
    )
    kept, written = tmp_path / "answers.jsonl", tmp_path / "result.json"
    options = ("--images", IMAGE.parent, "--max-tokens", 5, "--answers", kept, "--out", written)
    found = evaluated(engine, "vqa", "--data", data, *options)
    assert (found["accuracy"], found["samples"], found["failed"]) == (0.5, 2, 0)
    entries = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(e["id"], e["text"], e["accuracy"]) for e in entries] == [
        (7, answer, 1.0),
        (None, answer, 0.0),
    ]
    assert json.loads(written.read_text()) == found
    again = edgevlm("eval", engine, "vqa", "--data", data, *options[:4], "--answers", kept)
    assert again.code == 1
    assert "exists" in check_contract(again.err)[0]


def test_categories_have_scores_of_their_own(engine: Path, tmp_path: Path) -> None:
    image = {"image": str(IMAGE)}
    questions = lines(
        tmp_path / "pope.jsonl",
        image | {"text": "Is there a dog?", "label": "yes", "category": "random"},
        image | {"text": "Is there a cat?", "label": "no", "category": "adversarial"},
    )
    found = evaluated(engine, "pope", "--data", questions, "--max-tokens", 3)
    assert found["samples"] == 2
    assert set(found["categories"]) == {"random", "adversarial"}
    assert found["accuracy"] == np.mean([c["accuracy"] for c in found["categories"].values()])
    box = {"bbox": [1, 2, 30, 40], "width": 64, "height": 48}
    regions = lines(
        tmp_path / "refcoco.jsonl",
        image | box | {"sent": "the left dog", "category": "val"},
        image | box | {"prompt": "Where is the dog?"},
    )
    for options in ((), ("--scorer", "mmfuser", "--square-pad", "--box-scale", 1)):
        found = evaluated(engine, "refcoco", "--data", regions, "--max-tokens", 3, *options)
        assert (found["accuracy"], found["samples"], list(found["categories"])) == (0, 2, ["val"])


def test_a_sample_that_fails_is_named_and_left_out(engine: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(IMAGE.read_bytes()[:60])
    sample = {"question": "What is this?", "answer": "x"}
    data = lines(
        tmp_path / "vqa.jsonl", sample | {"image": broken.name}, sample | {"image": str(IMAGE)}
    )
    ran = edgevlm("eval", engine, "vqa", "--data", data, "--max-tokens", 2, "--json")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert (found["samples"], found["failed"]) == (1, 1)
    assert "line 1" in ran.err
    assert "1 samples could not be answered" in ran.err


REFUSED = {
    "no such task": (("vqaa",), "vqaa"),
    "no data": (("vqa",), "--data"),
    "an option of another task": (("pope", "--data", "x", "--window", 9), "--window"),
    "a scorer that is none": (("refcoco", "--data", "x", "--scorer", "coco"), "coco"),
    "a scale of the other scorer": (("refcoco", "--data", "x", "--box-scale", 9), "--box-scale"),
    "no samples": (("vqa", "--data", "x", "--limit", 0), "--limit 0"),
    "no such engine": (("perplexity", "--text", "x", "--against", "nowhere"), "nowhere"),
    "no such file": (("vqa", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str, engine: Path, tmp_path: Path) -> None:
    words, named = REFUSED[case]
    file = tmp_path / "x"
    file.write_text(TEXT)
    given = [str(file) if word == "x" else word for word in words]
    ran = edgevlm("eval", engine, *given)
    assert ran.code == 1
    assert named in check_contract(ran.err)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"image": "nowhere.png"},
        {"question": 3},
        {"answer": None},
        {"answers": ["a"]},
        {"answers": [1]},
        {"colour": "red"},
    ],
)
def test_a_wrong_line_is_refused_before_anything_is_asked(
    change: dict[str, Any], engine: Path, tmp_path: Path
) -> None:
    sample = {"image": str(IMAGE), "question": "What is this?", "answer": "x"}
    data = lines(tmp_path / "vqa.jsonl", sample, sample | change)
    kept = tmp_path / "answers.jsonl"
    ran = edgevlm("eval", engine, "vqa", "--data", data, "--answers", kept)
    assert ran.code == 1
    assert "line 2" in check_contract(ran.err)[0]
    assert not kept.exists()


def test_a_reference_needs_the_bundle(engine: Path, tmp_path: Path) -> None:
    import shutil

    moved = shutil.copytree(engine, tmp_path / "engine")
    edit_sealed(moved / "engine.json", lambda data: data.update(bundle=str(tmp_path / "gone")))
    ran = edgevlm("eval", moved, "agreement", "--against", "reference")
    assert ran.code == 1
    assert "is not there any more" in check_contract(ran.err)[0]


def test_the_list_names_every_task_and_all_options_exist(engine: Path) -> None:
    found = evaluated(engine, "list")
    assert [row["task"] for row in found["tasks"]] == list(TASKS)
    known = set(Request.__dataclass_fields__)
    assert {option for task in TASKS.values() for option in (*task.needs, *task.takes)} <= known


def test_the_snippet_of_the_page_runs(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/evaluation.md").read_text()
    code = re.search(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert code is not None
    (tmp_path / "engine").symlink_to(engine)
    lines(tmp_path / "vqa.jsonl", {"image": str(IMAGE), "question": "?", "answer": "x"})
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(code[1], "docs/evaluation.md", "exec"), found)
    assert found["result"]["samples"] == 1


def test_the_page_names_every_task_and_the_keys_of_its_samples() -> None:
    page = (ROOT / "docs/evaluation.md").read_text()
    assert [name for name in TASKS if f"| `{name}` |" not in page] == []
