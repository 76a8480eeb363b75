"""Masks as run lengths: both of COCO's forms, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.images import longest_side, rle
from edgevlm.toolkit.images.longest_side import LongestSide
from edgevlm.toolkit.images.resize import bilinear
from edgevlm.toolkit.ops.vocabulary import Array


def coco_text(counts: list[int]) -> str:
    """rleToString of cocodataset/cocoapi, written anew from its description."""
    text = ""
    for number, count in enumerate(counts):
        left = count - (counts[number - 2] if number > 2 else 0)
        more = True
        while more:
            bits = left & 0x1F
            left >>= 5
            more = left != -1 if bits & 0x10 else left != 0
            text += chr((bits | 0x20 * more) + 48)
    return text


def masks() -> list[Array]:
    generator = np.random.default_rng(0)
    noise = [generator.random(size) < share for size in ((1, 1), (7, 5), (40, 61))
             for share in (0.0, 0.1, 0.5, 1.0)]  # fmt: skip
    large = np.zeros((300, 500), bool)
    large[20:200, 100:480] = True
    return [*noise, large]


@pytest.mark.parametrize("mask", masks(), ids=lambda m: f"{m.shape}-{int(m.sum())}")
def test_masks_come_back(mask: Array) -> None:
    stored = rle.encode(mask)
    assert stored["size"] == list(mask.shape)
    assert np.array_equal(rle.decode(stored), mask)
    text = {"size": stored["size"], "counts": coco_text(stored["counts"])}
    assert np.array_equal(rle.decode(text), mask)
    assert np.array_equal(rle.decode({**text, "counts": text["counts"].encode()}), mask)


def test_runs_go_down_the_columns_and_begin_with_zeros() -> None:
    assert rle.encode(np.array([[0, 1, 1], [0, 0, 1]], bool))["counts"] == [2, 1, 1, 2]
    assert rle.encode(np.array([[1, 0]], bool))["counts"] == [0, 1, 1]


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"size": [2, 2]},
        {"size": [2, 2], "counts": [1, 2]},
        {"size": [2, 2], "counts": [5, -1]},
        {"size": [2, True], "counts": [2]},
        {"size": [0, 2], "counts": []},
        {"size": [2, 2], "counts": "\u00ff"},
        {"size": [2, 2], "counts": "o"},
        {"size": [2, 2], "counts": [1.0, 3.0]},
    ],
)
def test_what_is_no_mask_is_refused(stored: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="of a mask"):
        rle.decode(stored)


@pytest.mark.parametrize(("before", "after"), [((5, 7), (11, 6)), ((1, 3), (4, 4)), ((8, 8),) * 2])
def test_bilinear_is_torchs(before: tuple[int, int], after: tuple[int, int]) -> None:
    import torch

    image = np.random.default_rng(1).normal(size=before).astype(np.float32)
    resize: Any = torch.nn.functional.interpolate
    whole = torch.from_numpy(image)[None, None]
    expected = resize(whole, after, mode="bilinear", align_corners=False)[0, 0].numpy()
    assert np.abs(bilinear(image, after) - expected).max() < 1e-6
    cut = bilinear(image, after, cut=(2, 3))
    assert np.array_equal(cut, bilinear(image, after)[:2, :3])


def test_small_images_are_enlarged_and_the_rest_is_the_mean_colour() -> None:
    from PIL import Image

    rule = LongestSide(16)
    assert [rule.inner(size) for size in ((6, 8), (100, 33))] == [(12, 16), (16, 5)]
    with pytest.raises(InputError, match="100 x 3 pixels has none left"):
        rule.inner((3, 100))
    pixels = longest_side.preprocess(Image.new("RGB", (8, 6), (124, 116, 104)), rule)
    assert pixels.shape == (3, 16, 16)
    assert np.abs(pixels[:, :12]).max() < 0.02
    assert not pixels[:, 12:].any()
