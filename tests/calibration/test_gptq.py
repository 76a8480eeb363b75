"""GPTQ on a small linear: against the paper's update, and against rounding to nearest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgevlm.calibration import gptq
from edgevlm.calibration.gptq import Inputs
from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.blockwise import LINEAR


def case(generator: np.random.Generator, width: int = 192) -> tuple[Array, Array]:
    """Inputs whose channels resemble each other, and a weight."""
    mixing = generator.standard_normal((width, width)) / 8 + np.eye(width)
    x = (generator.standard_normal((512, width)) @ mixing).astype(np.float32)
    return x, generator.standard_normal((width, 40)).astype(np.float32)


def plainly(weight: Array, moments: Array, block: int) -> Array:
    """Channel by channel, with the inverse of what is left (optimal brain surgeon), in float64.

    Blocks with the most energy first, and so within them; of each block the range whose errors cost
    least once the channels to come have made up for them.
    """
    energy = np.diag(moments)
    blocks = sorted(range(0, len(energy), block), key=lambda at: -energy[at : at + block].sum())
    order = [i for at in blocks for i in sorted(range(at, at + block), key=lambda i: -energy[i])]
    w = weight.astype(np.float64)[order]
    h = moments.astype(np.float64)[np.ix_(order, order)]
    h += np.eye(len(h)) * 0.05 * np.diag(h).mean()
    left = [np.linalg.inv(h[i:, i:]) for i in range(len(h))]
    for i in range(len(w)):
        if i % block == 0:
            costs = [1 / left[j][0, 0] for j in range(i, i + block)]
            scale = cheapest(w[i : i + block], np.array(costs))
        rounded = np.clip(np.rint(w[i] / scale), -8, 7) * scale
        error = (w[i] - rounded) / left[i][0, 0]
        w[i + 1 :] -= left[i][1:, :1] * error
        w[i] = rounded
    found = np.empty_like(w)
    found[order] = w
    return found


def cheapest(block: Array, costs: Array) -> Array:
    """The scale of each column among shrunk ones."""
    largest = blockwise.scales_of(block.T.astype(np.float32), 4)
    tried = [largest * shrink for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)]
    paid = [costs @ (block - np.clip(np.rint(block / s), -8, 7) * s) ** 2 for s in tried]
    return np.array([tried[k][j] for j, k in enumerate(np.argmin(paid, 0))])


@pytest.mark.parametrize("block", [32, 64])
def test_it_is_the_paper_s_update(block: int, generator: np.random.Generator) -> None:
    x, weight = case(generator)
    moments = gptq.second_moments([x[:100], x[100:]], "a")
    np.testing.assert_allclose(moments, x.T @ x, rtol=1e-3, atol=1e-2)
    found = gptq.compensated(weight, Inputs(moments, "a"), replace(LINEAR[4], block=block))
    assert found.codes.scales.shape == (40, 192 // block)
    expected = plainly(weight, moments, block)
    same = np.abs(found.codes.floats() - expected) < 1e-4  # a tie may be rounded the other way
    assert same.mean() > 0.97


def test_blocks_with_zero_points_suit_weights_that_lean_to_one_side(
    generator: np.random.Generator,
) -> None:
    x, weight = case(generator, 256)
    weight = np.abs(weight) - 0.3
    moments = gptq.second_moments([x], "a")
    storage = replace(LINEAR[4], block=32)
    symmetric, leaning = (
        gptq.compensated(weight, Inputs(moments, "a"), replace(storage, zero_points=given))
        for given in (False, True)
    )
    assert leaning.error < 0.5 * symmetric.error
    codes = leaning.codes
    assert codes.zero_points is not None
    assert codes.zero_points.shape == (40, 256 // 32 // 2)
    zeros = blockwise.unpack(codes.zero_points).astype(np.float32)
    by_hand = blockwise.unpack(codes.codes).reshape(40, 8, 32) - zeros[..., None]
    rows = (by_hand * codes.scales[..., None]).reshape(40, 256)
    np.testing.assert_allclose(codes.floats(), rows.T, rtol=1e-6)
    # rounded to nearest, as no channel resembles another: within half a step of the weight
    alone = gptq.compensated(
        weight, Inputs(np.eye(256, dtype=np.float32), "a"), replace(storage, zero_points=True)
    )
    steps = np.repeat(alone.codes.scales, 32, 1).T
    assert (np.abs(alone.codes.floats() - weight) <= 0.501 * steps + 1e-6).mean() > 0.99


@pytest.mark.parametrize("block", [32, 64, 128])
def test_it_beats_rounding_to_nearest(block: int, generator: np.random.Generator) -> None:
    x, weight = case(generator, 256)
    moments = gptq.second_moments([x], "a")
    found = gptq.compensated(weight, Inputs(moments, "a"), replace(LINEAR[4], block=block))
    rows = blockwise.dequantize(*blockwise.quantize(weight.T, 4, block), 4)
    nearest = gptq.output_error(weight, rows.T, moments)
    assert found.error < 0.7 * nearest
    change = x @ (weight - found.codes.floats())
    assert found.error == pytest.approx(float((change**2).sum() / ((x @ weight) ** 2).sum()), 1e-2)


def test_a_channel_that_is_never_seen_is_rounded(generator: np.random.Generator) -> None:
    x, weight = case(generator, 64)
    x[:, 5] = 0
    found = gptq.compensated(weight, Inputs(gptq.second_moments([x], "a"), "a"), LINEAR[4])
    assert np.abs(found.codes.floats()[5] - weight[5]).max() < np.abs(weight).max() / 7


@pytest.mark.parametrize(("value", "message"), [(np.nan, "no numbers"), (0.0, "is zero")])
def test_inputs_that_say_nothing_are_refused(value: float, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        gptq.second_moments([np.full((4, 32), value, np.float32)], "lm/layers.0/mlp/up")
