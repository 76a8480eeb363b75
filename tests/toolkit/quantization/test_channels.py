"""8 bits with a scale per output of the weight and per row of the input: codes and rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.quantization import channels, row_pieces


def stored(weight: Array) -> tuple[Array, Array]:
    steps = channels.scales(weight)
    return np.concatenate(list(channels.codes(weight, steps))), steps


def test_codes_are_within_half_a_step(generator: np.random.Generator) -> None:
    weight = generator.standard_normal((40, 7)).astype(np.float32)
    weight[:, 2] = 0
    weight[:, 3] *= 1000
    codes, steps = stored(weight)
    assert codes.shape == weight.shape and codes.dtype == np.uint8
    assert codes.min() >= 1  # as many steps below zero as above
    found = channels.dequantize(codes, steps)
    assert (np.abs(found - weight) <= 0.501 * steps).all()
    assert not found[:, 2].any()
    np.testing.assert_allclose(np.abs(found).max(0), np.abs(weight).max(0), rtol=1e-6)


def test_codes_do_not_depend_on_the_pieces(
    generator: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = generator.standard_normal((13, 5)).astype(np.float16)
    whole = stored(weight)
    monkeypatch.setattr(row_pieces, "_PIECE", 20)
    for found, expected in zip(stored(weight), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_row_is_rounded_by_itself(generator: np.random.Generator) -> None:
    x = generator.standard_normal((2, 5, 16)).astype(np.float32)
    x[1, 3] *= 1e4  # an outlier among the rows
    x[0, 0] = 0
    found = channels.round_rows(x)
    for index in np.ndindex(2, 5):
        np.testing.assert_array_equal(found[index], channels.round_rows(x[index][None])[0])
        assert np.abs(found[index] - x[index]).max() <= 0.501 * np.abs(x[index]).max() / 127
    assert not found[0, 0].any()
    assert channels.round_rows(x[:, :0]).shape == (2, 0, 16)


def test_only_weights_of_this_storage_round_their_input(generator: np.random.Generator) -> None:
    x, weight = generator.standard_normal((3, 8)), generator.standard_normal((8, 4))
    ops: Any = channels.RoundRows(NumpyOps(), "part", {"a.weight"})
    w = Weights({"a.weight": weight, "b.weight": weight})
    np.testing.assert_array_equal(ops.linear(x, w / "a"), channels.round_rows(x) @ weight)
    np.testing.assert_array_equal(ops.linear(x, w / "b"), x @ weight)
