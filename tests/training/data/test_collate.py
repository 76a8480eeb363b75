"""Batches: against one that was made by hand, and against the goldens' lengths and pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.toolkit.images import decode, tiling
from edgevlm.toolkit.images.preprocess import ImageRules, Preprocess
from edgevlm.toolkit.images.tiling import TokenArrangement
from edgevlm.toolkit.images.views import PreparedImage
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.text.prompts import PromptRules
from edgevlm.toolkit.vlm import components
from edgevlm.training.data.collate import collate
from edgevlm.training.data.masking import IGNORED, TextRules
from edgevlm.training.data.prepare import SampleRules, prepare, rules_for
from edgevlm.training.data.sample import Sample
from edgevlm.training.data.samples import RawSample
from tests.training.data.files import llava
from tests.training.data.models import LLAVA, MLCD, golden

CUT = Preprocess("bicubic", 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), exact=(4, 4))
WIDE = replace(CUT, exact=(2, 6))


def made_rules(arrangement: TokenArrangement | None = None, **changes: Any) -> SampleRules:
    """Two encoders, four tokens a view."""
    images = ImageRules({"a": CUT, "b": WIDE}, None, arrangement)
    text = TextRules(PromptRules("vicuna_v1", "pieces", (2,)))
    return SampleRules(text, images, 4, **changes)


def view(value: float) -> dict[str, Array]:
    return {"a": np.full((3, 4, 4), value, np.float32), "b": np.full((3, 2, 6), value, np.float32)}


def image(first: float, views: int, order: tiling.ArrangedTokens | None = None) -> PreparedImage:
    return PreparedImage(tuple(view(first + n) for n in range(views)), order)


def sample(images: list[PreparedImage], runs: Any, labels: Any) -> Sample:
    return Sample("x", runs, labels, tuple(images), 0)


NO = IGNORED


def test_a_batch_made_by_hand() -> None:
    samples = [
        sample([image(1, 1)], ((1, 5), (6, 7, 2)), ((NO, NO), (NO, 7, 2))),
        sample([], ((1, 8, 9),), ((NO, NO, 9),)),
        sample([image(2, 1), image(3, 2)], ((), (5,), (6,)), ((), (5,), (6,))),
    ]
    batch = collate(samples, made_rules())
    text = [-1, -1]
    assert batch["ids"].tolist() == [
        [1, 5, 0, 0, 0, 0, 6, 7, 2, *[0] * 5],
        [1, 8, 9, *[0] * 11],
        [0, 0, 0, 0, 5, *[0] * 8, 6],
    ]
    assert batch["rows"].tolist() == [
        [*text, 0, 1, 2, 3, -1, -1, -1, *[-1] * 5],
        [-1] * 14,
        [4, 5, 6, 7, -1, 8, 9, 10, 11, 12, 13, 14, 15, -1],
    ]
    assert batch["score"].tolist() == [[6, 7], [1, 0], [3, 12]]
    assert batch["targets"].tolist() == [[7, 2], [9, NO], [5, 6]]
    assert {k: tuple(v.shape) for k, v in batch["pixels"].items()} == {
        "a": (4, 3, 4, 4), "b": (4, 3, 2, 6),
    }  # fmt: skip
    for pixels in batch["pixels"].values():
        assert pixels.dtype == torch.float32
        assert pixels[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert {batch[key].dtype for key in ("ids", "rows", "score", "targets")} == {torch.int64}
    assert set(batch) == {"pixels", "ids", "rows", "score", "targets"}


def test_a_batch_is_cut_before_it_is_scored() -> None:
    samples = [
        sample([image(1, 1)], ((1, 5), (6, 7, 2)), ((NO, NO), (NO, 7, 2))),
        sample([], ((1, 8, 9),), ((NO, NO, 9),)),
    ]
    batch = collate(samples, made_rules(max_length=8))
    assert batch["ids"].shape == (2, 8)
    assert batch["score"].tolist() == [[6], [1]]
    assert batch["targets"].tolist() == [[7], [9]]
    within = collate(samples, made_rules(max_length=4))  # the cut is inside the image
    assert within["rows"].tolist() == [[-1, -1, 0, 1], [-1] * 4]
    assert within["targets"].tolist() == [[NO], [9]]


def test_without_images_there_is_one_view_of_zeros() -> None:
    for samples in ([], [sample([], ((1, 8, 9),), ((NO, NO, 9),))]):
        batch = collate(samples, made_rules())
        assert {k: tuple(v.shape) for k, v in batch["pixels"].items()} == {
            "a": (1, 3, 4, 4), "b": (1, 3, 2, 6),
        }  # fmt: skip
        assert not any(pixels.any() for pixels in batch["pixels"].values())
        assert (batch["rows"] == -1).all()
    nothing = collate([], made_rules())
    assert nothing["score"].tolist() == [[0]]
    assert nothing["targets"].tolist() == [[NO]]


def test_the_newline_is_the_row_behind_all_views() -> None:
    order = TokenArrangement(2, "spatial", newline=True)
    one = tiling.arrange(order, 1, None, (8, 8))
    tiled = tiling.arrange(order, 3, (2, 1), (8, 4))
    samples = [
        sample([image(1, 3, tiled)], ((1,), (7,)), ((NO,), (7,))),
        sample([image(4, 1, one)], ((1,), (7,)), ((NO,), (7,))),
    ]
    rows = collate(samples, made_rules(order))["rows"].tolist()
    # Three views and one: 16 rows, then the newline. Tiles side by side, a newline per row.
    assert rows[0] == [-1, 0, 1, 2, 3, 4, 5, 8, 9, 16, 6, 7, 10, 11, 16, -1]
    assert rows[1] == [-1, 12, 13, 14, 15, 16, *[-1] * 10]


@pytest.mark.parametrize("pool", [True, False])
def test_an_arrangement_that_computes_gives_the_tokens_of_each_image_alone(pool: bool) -> None:
    order = TokenArrangement(2, "spatial", newline=not pool, pool=pool, max_tiles=0 if pool else 1)
    assert order.computes
    grids = [(3, (2, 1), (8, 4)), (1, None, (8, 8)), (5, (2, 2), (8, 8))]
    orders = [tiling.arrange(order, views, grid, size) for views, grid, size in grids]
    images = [image(0, views, made) for (views, _, _), made in zip(grids, orders, strict=True)]
    samples = [
        sample(images[:2], ((1,), (), (7,)), ((NO,), (), (7,))),
        sample(images[2:], ((1,), (7,)), ((NO,), (7,))),
    ]
    batch = collate(samples, made_rules(order))
    features = np.random.default_rng(0).normal(size=(9 * 4 + 1, 6)).astype(np.float32)
    newline = features[-1:]
    component = components.arrange_component(6, largest=pool)

    def placed(rows: Array, weights: Array, of: Array) -> Array:
        inputs = {"features": of, "rows": rows, "weights": weights}
        found: Array = component.forward(NumpyOps(), Weights({}), inputs)["tokens"]
        return found

    found = placed(batch["placed_rows"].numpy(), batch["placed_weights"].numpy(), features)
    expected, before = [], 0
    for (views, _, _), made in zip(grids, orders, strict=True):
        own = np.concatenate([features[before : before + 4 * views], newline])
        expected.append(placed(made.rows, made.weights, own if order.newline else own[:-1]))
        before += 4 * views
    np.testing.assert_array_equal(found, np.concatenate(expected))
    taken = batch["rows"][batch["rows"] >= 0].tolist()
    assert taken == list(range(len(found)))
    assert batch["placed_rows"].dtype == torch.int64
    assert batch["placed_weights"].dtype == torch.float32
    empty = collate([sample([], ((1, 7),), ((NO, 7),))], made_rules(order))
    assert empty["placed_rows"].shape == empty["placed_weights"].shape == (1, 4)
    assert (empty["rows"] == -1).all()


# -- goldens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LLAVA)
def test_the_training_batch_of_a_golden(name: str) -> None:
    case = golden(name)
    rules = rules_for(case.model, max_length=2048)
    samples = []
    for number, conversation in enumerate(case.case["train_conversations"]):
        roles = {"human": "user", "gpt": "assistant"}
        turns = tuple((roles[turn["from"]], turn["value"]) for turn in conversation)
        images = (case.folder / "image.png",) if number == 0 else ()
        raw = RawSample(str(number), images, turns)
        samples.append(prepare(raw, rules, case.tokenizer))
    batch = collate(samples, rules)
    (pixels,) = batch["pixels"].values()
    np.testing.assert_array_equal(pixels.numpy(), case.outputs["pixel_values"])
    assert tuple(batch["ids"].shape) == case.outputs["train_logits_argmax"].shape
    assert [s.length for s in samples][0] == batch["ids"].shape[1]
    views = rules.tokens_per_view
    ids, labels = case.inputs["train_input_ids"], case.inputs["train_labels"]
    for row, number in zip(labels, range(2), strict=True):
        targets = batch["targets"][number]
        assert targets[targets != NO].tolist() == row[row != NO].tolist()
        # Each scored position is the one before its target, images counted.
        flat = np.flatnonzero(row != NO)
        spliced = flat + (views - 1 if (ids[number] == -200).any() else 0) - 1
        assert batch["score"][number][targets != NO].tolist() == spliced.tolist()


def test_the_training_batch_of_mlcd_has_the_originals_length() -> None:
    case = golden(MLCD)
    rules = rules_for(case.model, original=False)
    questions = ["What is shown in this picture? Describe the colors.",
                 "\nCompare the first picture and the second picture."]  # fmt: skip
    samples = []
    for number, question in enumerate(questions):
        turns = (("user", f"<image>\n{question}"), ("assistant", "A cat and a dog."))
        raw = RawSample("x", (case.folder / f"image{number}.png",), turns)
        samples.append(prepare(raw, rules, case.tokenizer))
    assert tuple(case.outputs["train.logits_shape"]) == (2, samples[0].length, 1000)
    answer = sum(label != NO for run in samples[0].labels for label in run)
    assert samples[0].length - answer == len(case.outputs["one_image.logits"]) == 121
    batch = collate(samples, rules)
    for number in range(2):
        count = int((batch["rows"][number] >= 0).sum())
        assert count == len(case.outputs[f"image{number}.merged_tokens"])
    views = [len(case.outputs[f"image{n}.pixel_values_anyres"]) for n in range(2)]
    assert batch["pixels"]["mlcd"].shape[0] == sum(views)
    first = torch.from_numpy(case.outputs["image0.pixel_values_anyres"])
    assert torch.equal(batch["pixels"]["mlcd"][: views[0]], first)
    newline = sum(views) * rules.tokens_per_view
    assert int(batch["rows"].max()) == newline


def test_the_features_that_a_batch_places_are_the_originals() -> None:
    case = golden(MLCD)
    rules = rules_for(case.model)
    turns = (("user", "<image>\nQ"), ("assistant", "A"))
    samples = [
        prepare(RawSample("x", (case.folder / f"image{n}.png",), turns), rules, case.tokenizer)
        for n in range(2)
    ]
    batch = collate(samples, rules)
    projected = [case.outputs[f"image{n}.projected"] for n in range(2)]
    width = projected[0].shape[-1]
    merged = [case.outputs[f"image{n}.merged_tokens"] for n in range(2)]
    rows = np.concatenate([p.reshape(-1, width) for p in projected])
    features = np.concatenate([rows, merged[0][-1:]])  # the original ends with a newline
    for number in range(2):
        places = batch["rows"][number]
        np.testing.assert_array_equal(features[places[places >= 0].numpy()], merged[number])


def test_an_image_is_seen_as_in_a_question() -> None:
    rules, tokenizer = llava()
    case = golden("e2e_llava15")
    loaded = decode.load(case.folder / "image.png")
    turns = (("user", "<image>\nQ"), ("assistant", "A"))
    found = prepare(RawSample("x", (case.folder / "image.png",), turns), rules, tokenizer)
    from edgevlm.toolkit.images import views

    seen = views.prepare(loaded.rgb, case.model.images, count=1)
    np.testing.assert_array_equal(found.images[0].pixels[0]["clip"], seen.pixels[0]["clip"])
