"""RefCOCO as masks: counted as the original counts, and asked of an engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.engines.evaluation import masks
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.errors import ConfigError, InputError
from edgevlm.toolkit.images import rle
from edgevlm.toolkit.ops.vocabulary import Array
from tests.conftest import golden_case
from tests.systems import segmenting
from tests.systems.test_mlcd_golden import Golden

SAMPLES = ("one_seg", "two_segs", "no_object")


def test_scores_are_the_originals() -> None:
    golden = Golden(golden_case("mlcd_seg"))
    every = []
    for name in SAMPLES:
        found = golden.inputs[f"score.{name}.masks"], golden.inputs[f"score.{name}.truth"]
        one = masks.overlap(*found)
        every.append(one)
        for key, value in (("intersection", one.intersection), ("union", one.union),
                           ("accuracy_iou", one.accuracy)):  # fmt: skip
            expected = golden.outputs[f"score.{name}.{key}"]
            assert np.allclose(value, expected, rtol=1e-6, atol=1e-9), (name, key)
    ciou, giou = masks.totals(every)
    assert ciou == pytest.approx(float(golden.outputs["score.class_iou"]), rel=1e-6)
    assert giou == pytest.approx(float(golden.outputs["score.global_iou"]), rel=1e-6)


def mask(*rows: str) -> Array:
    return np.array([[int(c) for c in row] for row in rows])


def test_scores_by_hand() -> None:
    one = masks.overlap([mask("110", "000")], [mask("011", "000")])
    assert one.intersection.tolist() == [3, 1]
    assert one.union.tolist() == [5, 3]
    assert one.accuracy[1] == pytest.approx(1 / (3 + 1e-5))
    ignored = mask("011", "000")
    ignored[0, 2] = 255
    assert masks.overlap([mask("110", "000")], [ignored]).union.tolist() == [4, 2]
    nothing = masks.overlap([mask("00")], [mask("00")])
    assert nothing.accuracy[1] == 1
    # a missing mask counts as wrong, a surplus one does not count
    half = masks.overlap([mask("11")], [mask("11"), mask("10")])
    assert half.accuracy[1] == pytest.approx(0.5, rel=1e-4)
    whole = masks.overlap([mask("11"), mask("10")], [mask("11")])
    assert whole.accuracy[1] == pytest.approx(1.0, rel=1e-4)
    assert masks.totals([one, nothing])[0] == pytest.approx(1 / 3)
    with pytest.raises(InputError, match="is compared with"):
        masks.overlap([mask("11")], [mask("111")])


@pytest.fixture(scope="module")
def session(with_masks: Path) -> Iterator[Session]:
    with Session.open(with_masks / "engine-cpu") as opened:
        yield opened


def sample(truths: list[Array], **more: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": "The <image> shows.\nWhere?"},
        {"from": "gpt", "value": "It is [SEG]."},
        {"from": "human", "value": "<image>\nAnd the other?"},
        {"from": "gpt", "value": "[SEG]"},
    ]
    stated = [[rle.encode(truth) for truth in truths]]
    return {"images": ["image0.png"], "conversations": turns, "segmentation": stated, **more}


def test_questions_are_asked_one_by_one(session: Session, tmp_path: Path) -> None:
    image = segmenting.MLCD / "image0.png"
    own = [
        session.answer(Question(text, image, answer=said)).masks[0]
        for text, said in (("<image>\nThe  shows.\nWhere?", "It is [SEG]."),
                           ("And the other?", "[SEG]"))
    ]  # fmt: skip
    data = tmp_path / "val.json"
    split = {"metadata": {"dataset": "refcoco", "split": "val"}}
    data.write_text(json.dumps([sample(own, **split), sample([~own[0], own[1]])]))
    found = masks.refcoco_seg(session, data, images=segmenting.MLCD)
    assert (found.samples, found.masks, found.failed) == (2, 4, ())
    assert found.groups["refcoco/val"] == pytest.approx((1, 1), rel=1e-4)
    assert found.giou < 1
    forced = masks.refcoco_seg(session, data, images=segmenting.MLCD, answers="forced", limit=1)
    assert forced.samples == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[3]", "val.json[0] is no object"),
        ('{"image": 3}', "images = 3"),
        ('{"image": "a"}', "has no conversations"),
        ('{"image": "a", "conversations": [{"value": "Q"}, {}]}', "not questions with an answer"),
        ("[]", "holds no sample"),
    ],
)
def test_what_is_no_sample_is_refused(
    session: Session, text: str, reason: str, tmp_path: Path
) -> None:
    data = tmp_path / "val.json"
    data.write_text(text)
    with pytest.raises(InputError) as caught:
        masks.refcoco_seg(session, data)
    assert reason in caught.value.message


def test_a_model_without_masks_is_refused(ready: Path, tmp_path: Path) -> None:
    with Session.open(ready / "engine-cpu") as plain, pytest.raises(ConfigError, match="no masks"):
        masks.refcoco_seg(plain, tmp_path / "val.json")
