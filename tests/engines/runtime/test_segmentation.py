"""Masks from the command line: files, JSON, what is refused; in turns with other replies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.images import rle
from tests.refusals import IMAGE, edgevlm, refuses
from tests.systems import segmenting

FILES = [segmenting.MLCD / "image0.png", segmenting.MLCD / "image1.png"]


def test_masks_are_written_one_file_each_and_the_picture_is_tinted(
    with_masks: Path, tmp_path: Path
) -> None:
    engine, out, overlay = with_masks / "engine-cpu", tmp_path / "out.png", tmp_path / "seen.png"
    words = ("run", engine, "Where?", "--image", FILES[0], "--force-seg")
    done = edgevlm(*words, "--masks", out, "--overlay", overlay)
    assert done.out.strip() == "[SEG]"
    assert f"wrote {out}" in done.err
    data = json.loads(edgevlm(*words, "--json").out)
    (stated,) = data["masks"]
    assert data["finish_reason"] == "given"
    assert stated["image"] == 0
    with Image.open(out) as file, Image.open(FILES[0]) as original:
        assert file.mode == "1"
        assert file.size == original.size
        assert np.array_equal(np.asarray(file), rle.decode(stated))
    with Image.open(overlay) as file, Image.open(FILES[0]) as original:
        moved = np.abs(
            np.asarray(file).astype(int) - np.asarray(original.convert("RGB")).astype(int)
        )
        inside = rle.decode(stated)
        assert inside.any()
        assert moved[inside].any()
        assert not moved[~inside].any()
    assert "exists" in refuses(tmp_path, *words, "--masks", out)[0]


def test_no_mask_is_said_and_is_no_failure(with_masks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    words = ("run", with_masks / "engine-cpu", "Where?", "--image", FILES[0], "--max-tokens", 1)
    done = edgevlm(*words, "--masks", out)
    assert done.code == 0
    assert "no mask: the answer holds no [SEG]" in done.err
    assert not out.exists()
    assert json.loads(edgevlm(*words, "--json").out)["masks"] == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--masks", "a.jpg"), "does not end with .png"),
        (("--overlay", "a.gif"), "does not end with .png or .jpg"),
        (("--masks", "none/a.png"), "none is not a folder"),
        (("--masks", "a.png", "--input", "x.jsonl"), "--masks is for one question"),
    ],
)
def test_files_that_cannot_be_are_refused(
    words: tuple[str, ...], reason: str, with_masks: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    question = () if "--input" in words else ("Where?",)
    assert reason in refuses(tmp_path, "run", with_masks / "engine-cpu", *question, *words)[0]


def test_a_model_without_masks_names_the_options(ready: Path, tmp_path: Path) -> None:
    words = ("run", ready / "engine-cpu", "What?", "--image", IMAGE)
    options = ("--masks", tmp_path / "a.png", "--force-seg")
    assert "--masks, --force-seg: " in refuses(tmp_path, *words, *options)[0]
    with Session.open(ready / "engine-cpu") as session:
        with pytest.raises(InputError, match="makes no masks"):
            session.ask(Question("What?", answer="[SEG]"))
        assert session.answer(Question("What?", max_tokens=1)).segments is None


def test_what_gives_texts_alone_refuses_the_model(with_masks: Path, tmp_path: Path) -> None:
    engine, out = with_masks / "engine-cpu", tmp_path / "out"
    for words in (
        ("batch", engine, FILES[0].parent, out, "--prompt", "Where?"),
        ("deploy", "triton", engine, out),
    ):
        message, hint = refuses(tmp_path, *words)
        assert "masks, which would be lost" in message
        assert "edgevlm run" in hint


def test_requests_of_a_file_have_their_masks(with_masks: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "Where?", "image": str(FILES[0])}, {"prompt": "Where?"}]
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("run", with_masks / "engine-cpu", "--input", file, "--force-seg", "--json")
    entries = json.loads(edgevlm(*words).out)["answers"]
    assert [len(entry["masks"]) for entry in entries] == [1, 0]


def test_replies_in_turns_have_the_masks_that_they_have_alone(with_masks: Path) -> None:
    asked = [Question("Where?", [file], 20, answer="It is [SEG] and [SEG]") for file in FILES]
    with Session.open(with_masks / "engine-cpu") as session:
        alone = [session.answer(question) for question in asked]
        replies = [session.ask(question) for question in asked]
        for reply in replies:
            list(reply)
        for reply, expected in zip(reversed(replies), reversed(alone), strict=True):
            assert len(reply.answer.logits) == 2
            for found, wanted in zip(reply.answer.logits, expected.logits, strict=True):
                assert np.array_equal(found, wanted)


def test_a_profile_times_one_mask_beside_its_floor(with_masks: Path) -> None:
    words = ("profile", with_masks / "engine-cpu", "--image", FILES[0], "--runs", 1, "--json")
    data = json.loads(edgevlm(*words, "--warmup", 0, "--max-tokens", 2).out)
    stages = {bound["stage"]: bound for bound in data["roofline"]["stages"]}
    for stage in ("segmenter.encoder", "segmenter.decoder"):
        assert data["stages"][stage]["p50_ms"] > 0
        assert stages[stage]["floor_ms"] > 0
    assert stages["segmenter.encoder"]["gflops"] > stages["segmenter.decoder"]["gflops"] > 0
