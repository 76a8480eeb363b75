"""Every kind of bad data is named and counted; too much of it is one clear error."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgevlm.toolkit.errors import DataError
from edgevlm.training.data import broken
from edgevlm.training.data.broken import BrokenSample, Report
from edgevlm.training.data.json_samples import JsonSamples
from edgevlm.training.data.masking import IGNORED
from edgevlm.training.data.prepare import prepare, rules_for
from edgevlm.training.data.samples import RawSample
from edgevlm.training.data.scan import scan
from tests.training.data.files import item, llava, png, write_images, write_lines
from tests.training.data.models import golden


def talk(*turns: str, roles: tuple[str, str] = ("user", "assistant")) -> tuple[Any, ...]:
    return tuple((roles[n % 2], text) for n, text in enumerate(turns))


BAD: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "no image given": ((), talk("<image>\nQ", "A"), broken.IMAGE_COUNT),
    "image not shown": ((png(1),), talk("Q", "A"), broken.IMAGE_COUNT),
    "one image too few": ((png(1),), talk("<image><image>Q", "A"), broken.IMAGE_COUNT),
    "image is missing": ((Path("/nowhere/x.png"),), talk("<image>\nQ", "A"), broken.MISSING_IMAGE),
    "image is damaged": ((png(1)[:200],), talk("<image>\nQ", "A"), broken.BAD_IMAGE),
    "image is no image": ((b"<html>",), talk("<image>\nQ", "A"), broken.BAD_IMAGE),
    "empty answer": ((), talk("Q", " \n"), broken.EMPTY_ANSWER),
    "empty question": ((), talk("", "A"), broken.EMPTY_QUESTION),
    "no answer": ((), talk("Q"), broken.NO_ANSWER),
    "question last": ((), talk("Q", "A", "Q"), broken.NO_ANSWER),
    "no turns": ((), (), broken.NO_ANSWER),
    "an answer alone": ((), (("assistant", "A"),), broken.NO_ANSWER),
    "two questions": ((), (("user", "Q"), ("user", "Q")), broken.ROLES),
    "another role": ((), (("system", "S"), ("user", "Q"), ("assistant", "A")), broken.ROLES),
    "text of the template": ((), talk("Q", "a</s>b"), broken.MISMATCH),
}


@pytest.mark.parametrize("name", BAD)
def test_each_kind_of_bad_sample_is_named(name: str) -> None:
    images, turns, kind = BAD[name]
    with pytest.raises(BrokenSample) as caught:
        prepare(RawSample("the name", images, turns), *llava())
    assert caught.value.kind == kind
    assert str(caught.value).startswith(f"the name: {kind}")
    copy = pickle.loads(pickle.dumps(caught.value))  # worker processes send it back
    assert (copy.name, copy.kind, copy.reason) == caught.value.args


def test_an_image_that_exists_but_is_a_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BrokenSample) as caught:
        prepare(RawSample("x", (tmp_path,), talk("<image>\nQ", "A")), *llava())
    assert caught.value.kind == broken.MISSING_IMAGE


def test_a_first_turn_of_the_assistant_is_left_out() -> None:
    turns = talk("Q", "A")
    without, greeted = (
        prepare(RawSample("x", (), t), *llava()) for t in (turns, (("assistant", "Hello"), *turns))
    )
    assert without == greeted


def test_text_only_and_captions_are_fine() -> None:
    text = prepare(RawSample("x", (), talk("Q", "A")), *llava())
    assert text.images == ()
    assert text.length == len(text.runs[0])
    plain = prepare(RawSample("x", (png(1),), talk("<image>", "A")), *llava(template="plain"))
    assert len(plain.images) == 1
    for raw in (RawSample("x", (), talk("Q", "A")),
                RawSample("x", (png(1),), talk("<image>Q", "A", "Q", "A")),
                RawSample("x", (png(1), png(2)), talk("<image><image>", "A"))):  # fmt: skip
        with pytest.raises(BrokenSample) as caught:
            prepare(raw, *llava(template="plain"))
        assert caught.value.kind == broken.IMAGE_COUNT


def test_an_answer_beyond_the_context_is_truncated_or_broken() -> None:
    raw = RawSample("x", (png(1),), talk("<image>\nWhat is it?", "A very long answer. " * 20))
    rules, tokenizer = llava()
    whole = prepare(raw, rules, tokenizer)
    assert whole.lost == 0
    labels = [number for run in whole.labels for number in run]
    answer = sum(number != IGNORED for number in labels)
    assert whole.length == len(labels) + rules.tokens_per_view
    first = whole.length - answer  # the position of the first token of the answer
    cut = prepare(raw, replace(rules, max_length=first + 1), tokenizer)
    assert (cut.length, cut.lost) == (first + 1, answer - 1)
    with pytest.raises(BrokenSample, match=f"{whole.length} positions, {first} are read") as caught:
        prepare(raw, replace(rules, max_length=first), tokenizer)
    assert caught.value.kind == broken.BEYOND
    full = prepare(raw, replace(rules, max_length=whole.length), tokenizer)
    assert full == replace(full, lost=0, length=whole.length)


def test_several_images_are_padded_where_there_are_tiles() -> None:
    case = golden("mlcd_llavanext_e2e")
    rules = rules_for(case.model)
    images = (png(1, (90, 40)), png(2))
    one = prepare(RawSample("x", images[:1], talk("<image>\nQ", "A")), rules, case.tokenizer)
    two = prepare(RawSample("x", images, talk("<image><image>Q", "A")), rules, case.tokenizer)
    assert len(one.images[0].pixels) > 1
    assert [len(image.pixels) for image in two.images] == [1, 1]
    tiled = rules_for(case.model, several="tile")
    two = prepare(RawSample("x", images, talk("<image><image>Q", "A")), tiled, case.tokenizer)
    assert len(two.images[0].pixels) == len(one.images[0].pixels)


# -- scanning and counting -------------------------------------------------------------------------


def spoilt(folder: Path, good: int) -> JsonSamples:
    """A set with one sample of five kinds of fault among `good` others."""
    images = write_images(folder / "images", 3)
    items: list[Any] = [item(n, text=n % 2 == 1) for n in range(3)] * (good // 3)
    items.insert(1, "{broken")
    items.insert(3, {**item(1), "image": "gone.png"})
    items.insert(5, {**item(1), "conversations": [{"from": "human", "value": "<image>"},
                                                  {"from": "gpt", "value": ""}]})  # fmt: skip
    items.insert(7, {**item(1, text=True), "image": "1.png"})
    items.append({"id": 7})
    return JsonSamples(write_lines(folder / "train.jsonl", items), images)


def test_a_scan_finds_the_faults_before_training(tmp_path: Path) -> None:
    found = scan(spoilt(tmp_path, 30))
    assert {fault.kind: fault.name.split(" ")[0] for fault in found.broken} == {
        broken.BROKEN_JSON: "train.jsonl[1]",
        broken.MISSING_IMAGE: "train.jsonl[3]",
        broken.EMPTY_ANSWER: "train.jsonl[5]",
        broken.IMAGE_COUNT: "train.jsonl[7]",
        broken.STRUCTURE: "train.jsonl[34]",
    }
    assert len(found.usable) == len(found.lengths) == 30
    assert found.usable.tolist() == [n for n in range(34) if n not in (1, 3, 5, 7)]
    # "<image>\nWhat is it?" and one word; "What is it?" and one word.
    assert sorted(set(found.lengths.tolist())) == [-4, 5, 6]


def test_few_broken_samples_are_reported_and_many_end_the_training(tmp_path: Path) -> None:
    found = scan(spoilt(tmp_path, 30))
    report = broken.report(found.broken, 35, limit=5 / 35)
    report.check()
    assert report.broken == 5
    assert f"{broken.MISSING_IMAGE}: 1: train.jsonl[3] id n1 ({tmp_path}/images/gone.png)" in (
        report.lines()
    )
    with pytest.raises(DataError, match="5 of 35 samples are broken, more than 1 %") as caught:
        broken.report(found.broken, 35).check()
    assert "train.jsonl[1]" in caught.value.message
    assert "--max-broken" in caught.value.hint


def test_a_report_names_ten_counts_each_once_and_joins_others() -> None:
    report, other = Report(1000, 0.02), Report(1000, 0.02)
    for number in [*range(12), *range(12)]:
        report.add(BrokenSample(f"s{number}", broken.MISMATCH))
    for number in range(10, 15):
        other.add(BrokenSample(f"s{number}", broken.MISMATCH))
    other.good("long", truncated=True)
    assert report.counts == {broken.MISMATCH: 12}
    report.merge(other)
    assert report.counts == {broken.MISMATCH: 15, broken.TRUNCATED: 1}
    assert report.broken == 15
    (line, truncated) = report.lines()
    assert line.endswith("s8, s9, and 5 more")
    assert truncated == f"{broken.TRUNCATED}: 1: long"
    report.check()
    for number in range(6):
        report.add(BrokenSample(f"t{number}", broken.BAD_IMAGE))
    with pytest.raises(DataError) as caught:
        report.check()
    assert "long" not in caught.value.message


def test_a_stream_is_measured_by_what_was_seen() -> None:
    report = Report(None)
    for number in range(10):
        report.add(BrokenSample(f"s{number}", broken.MISMATCH))
    report.check()
    report.add(BrokenSample("s10", broken.MISMATCH))
    with pytest.raises(DataError, match="11 of the first 11 samples"):
        report.check()
    for number in range(2000):
        report.good(f"g{number}")
    report.check()


def test_worker_processes_take_rules_and_tokenizer() -> None:
    rules, tokenizer = pickle.loads(pickle.dumps(llava()))
    raw = RawSample("x", (), talk("Q", "A"))
    assert prepare(raw, rules, tokenizer) == prepare(raw, *llava())
