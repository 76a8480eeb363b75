"""The scores of single answers: boxes against two published programs, VQA and POPE by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from edgevlm.engines.evaluation import pope, refcoco, vqa
from tests.conftest import HERE

GROUNDING = json.loads((HERE / "goldens/grounding.json").read_text())
MMFUSER = {
    "mmfuser_scale999": (999.0, False),
    "mmfuser_scale1_squarepad": (1.0, True),
    "mmfuser_scale999_squarepad": (999.0, True),
}


def check(found: Any, score: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(found, expected["box"], rtol=1e-6, atol=1e-4)
    assert score["iou"] == pytest.approx(expected["iou"], abs=1e-6)
    assert score["hit"] == bool(expected["correct"])


def test_boxes_score_as_in_conv_llava() -> None:
    hits = 0
    for case in GROUNDING:
        truth = refcoco.Truth(tuple(case["gt_bbox_xyxy"]), case["width"], case["height"])
        score = refcoco.hit(case["answer"], truth, "convllava", 999.0, False)
        box = refcoco.convllava_box(case["answer"], truth.width, truth.height)
        check(box, score, case["convllava"])
        hits += score["hit"]
    assert 10 < hits < len(GROUNDING) - 10


@pytest.mark.parametrize("name", MMFUSER)
def test_boxes_score_as_in_mmfuser(name: str) -> None:
    scale, pad = MMFUSER[name]
    for case in GROUNDING:
        truth = refcoco.Truth(tuple(case["gt_bbox_xyxy"]), case["width"], case["height"])
        score = refcoco.hit(case["answer"], truth, "mmfuser", scale, pad)
        box = refcoco.mmfuser_box(case["answer"], truth.width, truth.height, scale, pad)
        check(box, score, case[name])


@pytest.mark.parametrize("scorer", refcoco.SCORERS)
def test_an_answer_of_any_kind_has_a_score(scorer: str) -> None:
    truth = refcoco.Truth((1.0, 2.0, 30.0, 40.0), 64, 48)
    for answer in (
        "",
        "[[]]",
        "[[[1]]]",
        "[[1,2,3,NaN]]",
        '[["a",1,2,3]]',
        "[inf,1,2,3]",
        "[" * 99,
    ):
        assert not refcoco.hit(answer, truth, scorer, 999.0, False)["hit"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),  # only one apostrophe is put back
        ("couldnt've", "couldn't've"),
        ("shes", "shes"),
        ("1,000 people", "1000 people"),
        ("black/white", "black white"),
        ("yes, it is", "yes it is"),
        ("red,green", "red green"),
        ("3.5 m.", "3.5 m"),
        ("T-shirt", "t shirt"),
        ("an\tumbrella\n", "umbrella"),
        ("what?!", "what"),
    ],
)
def test_answers_are_normalised_as_by_the_official_scorer(text: str, expected: str) -> None:
    assert vqa.normalised(text) == expected


def test_vqa_accuracy_averages_over_the_other_nine() -> None:
    def people(matching: int) -> list[str]:
        return ["Cat."] * matching + [f"thing {n}" for n in range(10 - matching)]

    found = [vqa.accuracy("a cat", people(n)) for n in (0, 1, 2, 3, 4, 10)]
    assert found == pytest.approx([0.0, 0.3, 0.6, 0.9, 1.0, 1.0])
    assert vqa.accuracy("Cats", ["cat"]) == 0.0
    assert vqa.accuracy("The cat", ["cat"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is none", False),
        ("There is not a dog.", False),
        ("Yes. There is no doubt", True),  # the first sentence alone counts
        ("NO", True),  # neither of the words that are looked for
        ("Nothing", True),
    ],
)
def test_pope_reads_answers_as_llava_does(answer: str, yes: bool) -> None:
    assert pope.says_yes(answer) is yes


def test_pope_scores_by_hand() -> None:
    pairs = [(True, True)] * 6 + [(True, False)] * 2 + [(False, True)] * 3 + [(False, False)] * 9
    found = pope.scores(pairs)
    assert found == {
        "samples": 20,
        "accuracy": 0.75,
        "precision": 0.75,
        "recall": pytest.approx(6 / 9, abs=1e-6),
        "f1": pytest.approx(12 / 17, abs=1e-6),
        "yes_ratio": 0.4,
    }
    assert pope.scores([(False, False)])["f1"] == 0.0
