"""Linears rounded while samples go through: scales found, folded, and errors made up for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from edgevlm.calibration import awq, gptq, rounding, smooth, steps
from edgevlm.calibration.many import ManyOps, hidden
from edgevlm.calibration.rounding import METHODS
from edgevlm.calibration.smooth import Link
from edgevlm.toolkit import models
from edgevlm.toolkit.bundle.goldens import relative_rms
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.blockwise import LINEAR
from edgevlm.toolkit.quantization.coded import Coded
from edgevlm.toolkit.vlm.components import Component
from tests.toolkit.models.test_architectures import component, tensors

LMS = models.kinds("lms")
FOUR = replace(LINEAR[4], block=32)


def quiet(message: str) -> None:
    """Progress that nobody reads."""


def windows(lm: Component, count: int = 8) -> Array:
    vocabulary = lm.shapes["embed.weight"][0]
    return np.random.default_rng(3).integers(0, vocabulary, (count, 24))


def loud(lm: Component) -> dict[str, Array]:
    """Weights whose norms make two channels loud, as trained models' do."""
    weights = tensors(lm)
    for key in weights:
        if ".norm" in key and key.startswith("layers."):
            weights[key][[5, 17]] *= 30
    return weights


def storages(lm: Component) -> dict[str, blockwise.StorageFormat]:
    return {k: FOUR for k, s in lm.shapes.items() if k.startswith("layers.") and len(s) == 2}


@pytest.mark.parametrize("zero_points", [False, True])
def test_nearest_is_what_a_file_without_samples_holds(
    zero_points: bool, generator: np.random.Generator
) -> None:
    weight = generator.standard_normal((128, 24)).astype(np.float32)
    storage = replace(FOUR, zero_points=zero_points)
    found = steps.nearest(weight, storage)
    largest = np.repeat(np.abs(found.scales), 32, 1).T
    assert (np.abs(found.floats() - weight) <= largest * 1.001).all()
    if not zero_points:
        codes, scales = blockwise.quantize(weight.T, 4, 32)
        np.testing.assert_array_equal(found.codes, codes)
        np.testing.assert_array_equal(found.scales, scales)


def test_a_range_is_shrunk_where_that_costs_less(generator: np.random.Generator) -> None:
    weight = generator.standard_normal((256, 64)).astype(np.float32)
    costs = generator.uniform(0.1, 10, 256).astype(np.float32)
    plain, clipped = (steps.nearest(weight, FOUR, given) for given in (None, costs))
    paid = [costs @ np.square(c.floats() - weight) for c in (plain, clipped)]
    assert (paid[1] <= paid[0] * 1.0001).all()
    assert paid[1].sum() < 0.95 * paid[0].sum()
    ratio = clipped.scales / plain.scales
    assert set(np.unique(ratio.round(2))) <= {np.float32(x) for x in steps.SHRINKS}


def test_the_search_finds_the_loud_channels(generator: np.random.Generator) -> None:
    x = generator.standard_normal((200, 64)).astype(np.float32)
    x[:, [7, 40]] *= 30
    weight = generator.standard_normal((64, 32)).astype(np.float32)
    link = Link("norm.", ["lm/a"], ["a.weight"])
    inputs, storage = [x[None, :120], x[None, 120:]], {"a.weight": FOUR}
    energy = np.square(x).sum(0)
    found = awq.scales(link, inputs, energy, {"a.weight": weight}, storage)
    assert set(np.argsort(found)[-2:]) == {7, 40}
    moments = gptq.second_moments([x], "a")
    plain = steps.nearest(weight, FOUR).floats()
    scaled = steps.nearest(weight * found[:, None], FOUR).floats() / found[:, None]
    errors = [gptq.output_error(weight, q, moments) for q in (plain, scaled)]
    assert errors[1] < 0.3 * errors[0]
    alike = np.ones((200, 64), np.float32)
    same = awq.scales(link, [alike], np.ones(64), {"a.weight": weight}, storage)
    assert same.tolist() == [1] * 64


@pytest.mark.parametrize("kind", LMS)
def test_in_float_the_model_stays_the_same(kind: str) -> None:
    lm = component("lms", kind)
    weights, ids = loud(lm), windows(lm)
    found = rounding.rounded(lm, weights, ids, storages(lm), "awq", quiet)
    linked = rounding.links(lm, storages(lm))
    sources = {name for i in range(2) for name in (f"layers.{i}.norm1.", f"layers.{i}.norm2.")}
    assert {link.source for link in linked} == sources | {f"layers.{i}.mlp.up." for i in range(2)}
    assert found.scales.keys() == {link.source for link in linked}
    assert any(np.ptp(scales) > 0.1 for scales in found.scales.values())
    changed = smooth.smoothed(weights, found.scales, linked)
    pairs = zip(
        hidden(lm, ManyOps(), changed, ids), hidden(lm, ManyOps(), weights, ids), strict=True
    )
    assert relative_rms(list(pairs)) < 1e-5


@pytest.mark.parametrize("kind", LMS)
def test_each_method_costs_less_than_the_one_before(kind: str) -> None:
    lm = component("lms", kind)
    weights, ids = loud(lm), windows(lm, 40)
    plain, costs = hidden(lm, ManyOps(), weights, ids), dict[str, float]()
    for method in METHODS:
        found = rounding.rounded(lm, weights, ids, storages(lm), method, quiet)
        assert found.codes.keys() == found.errors.keys() == storages(lm).keys()
        linked = [x for x in rounding.links(lm, storages(lm)) if x.source in found.scales]
        made = Coded(smooth.smoothed(weights, found.scales, linked), found.codes)
        pairs = zip(hidden(lm, ManyOps(), made, ids), plain, strict=True)
        costs[method] = relative_rms(list(pairs))
    assert costs["awq"] < 0.95 * costs["rtn"]
    assert costs["gptq"] < 0.8 * costs["rtn"]
    assert costs["awq+gptq"] < 0.8 * costs["rtn"]


def test_a_linear_makes_up_for_the_layers_before_it(generator: np.random.Generator) -> None:
    mixing = generator.standard_normal((64, 64)) / 8 + np.eye(64)
    plain = (generator.standard_normal((800, 64)) @ mixing).astype(np.float32)
    given = plain + 0.2 * np.roll(plain, 1, axis=1)  # what rounded layers made of it
    weight = generator.standard_normal((64, 16)).astype(np.float32)
    moments = gptq.second_moments([given], "a")
    blind = gptq.compensated(weight, gptq.Inputs(moments, "a"), FOUR)
    aware = gptq.compensated(weight, gptq.Inputs(moments, "a", gptq.shift([given], [plain])), FOUR)
    errors = [
        float(np.square(given @ found.codes.floats() - plain @ weight).sum())
        for found in (blind, aware)
    ]
    assert errors[1] < 0.4 * errors[0]
    assert aware.error < 2 * blind.error  # of rounding alone


def test_loud_blocks_come_first() -> None:
    energy = np.ones(96, np.float32)
    energy[[40, 70, 71]] = 5, 3, 4
    order = gptq.loudest_first(np.diag(energy), 32)
    assert sorted(order) == list(range(96))
    assert [int(i) // 32 for i in order[::32]] == [2, 1, 0]
    assert order[:2].tolist() == [71, 70]
    assert order[32] == 40
    for start in range(0, 96, 32):
        falling = energy[order[start : start + 32]]
        assert all(a >= b for a, b in pairwise(falling))
