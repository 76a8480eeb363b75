"""Ranges from histograms: equal to a brute-force computation, better than the largest value."""

from __future__ import annotations

import numpy as np
import pytest

from edgevlm.calibration.histogram import BINS, METHODS, PERCENTILE, Histogram, ranges_of
from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.static import LARGEST
from tests.calibration.peaks import peak


def histogram(*pieces: Array) -> Histogram:
    found = Histogram()
    for piece in pieces:
        found.add(piece, "lm/a")
    return found


def normal(size: int, scale: float = 1.0, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def error(x: Array, largest: float) -> float:
    """Mean squared error of x in 8 bits."""
    step = largest / LARGEST
    return float(np.square(x - np.clip(np.rint(x / step), -128, 127) * step).mean())


def test_counts_are_numpys_in_any_order_and_however_it_widens() -> None:
    pieces = [normal(1000, scale, i) for i, scale in enumerate((0.1, 3.0, 0.5, 40.0, 1.0))]
    pieces.append(np.zeros(17, np.float32))
    one, two = histogram(*pieces), histogram(*pieces[::-1])
    sizes = np.abs(np.concatenate(pieces))
    assert (one.limit, one.zeros, one.largest) == (two.limit, 17, float(sizes.max()))
    assert one.limit / 2 <= one.largest < one.limit
    expected, _ = np.histogram(sizes[sizes > 0], BINS, (0, one.limit))
    np.testing.assert_array_equal(one.counts, expected)
    np.testing.assert_array_equal(two.counts, expected)


@pytest.mark.parametrize("largest", [1.0, 0.5, 0.9999999, 3.0, 1e-30, 1e30])
def test_ends_of_powers_of_two_are_counted(largest: float) -> None:
    found = histogram(np.asarray([largest, -largest / 4], np.float32))
    assert found.counts.sum() == 2
    assert METHODS["minmax"](found) == pytest.approx(largest)


def test_minmax_and_percentile_are_those_of_all_values() -> None:
    pieces = [normal(40_000, scale, i) for i, scale in enumerate((1.0, 2.0, 0.3))]
    pieces.append(np.zeros(1000, np.float32))
    found, sizes = histogram(*pieces), np.abs(np.concatenate(pieces))
    width = found.limit / BINS
    assert METHODS["minmax"](found) == float(sizes.max())
    assert METHODS["percentile"](found) == pytest.approx(
        float(np.quantile(sizes, PERCENTILE)), abs=width
    )


def test_mse_is_as_good_as_a_search_over_the_values_themselves() -> None:
    x = np.random.default_rng(3).laplace(0, 1, 50_000).astype(np.float32)
    chosen = METHODS["mse"](histogram(x))
    best = min(error(x, largest) for largest in np.linspace(2, np.abs(x).max(), 300))
    assert error(x, chosen) < 1.02 * best
    assert chosen < np.abs(x).max()


@pytest.mark.parametrize("method", ["mse", "entropy", "percentile"])
def test_an_outlier_does_not_decide(method: str) -> None:
    """One value in 100,000, thirty times the rest: clipping it is cheaper than coarse steps."""
    x = normal(100_000)
    x[77] = 120.0
    chosen = METHODS[method](histogram(x))
    assert chosen < 90
    inside = np.delete(x, 77)
    assert error(inside, chosen) < 0.5 * error(inside, METHODS["minmax"](histogram(x)))
    if method == "mse":
        assert error(x, chosen) < error(x, 120.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [[1.0], [0.0, 5.0], [1.0] * 50 + [1.5]])
def test_few_values_have_a_range_that_holds_them(method: str, values: list[float]) -> None:
    chosen = METHODS[method](histogram(np.asarray(values, np.float32)))
    assert 0.5 * max(values) <= chosen <= max(values)


def test_memory_does_not_grow_with_samples() -> None:
    def add(samples: int) -> None:
        found = Histogram()
        for i in range(samples):
            found.add(normal(20_000, 1 + i, i), "lm/a")

    add(2)  # what NumPy loads at first use
    assert peak(lambda: add(40)) < 1.2 * peak(lambda: add(4))


def test_what_gives_no_range_is_named() -> None:
    for value in (np.inf, -np.inf, np.nan):
        with pytest.raises(CalibrationError, match="the input of lm/a has values that are no"):
            histogram(np.asarray([1.0, value], np.float32))
    dead = {"lm/a": histogram(np.zeros(4, np.float32)), "lm/b": histogram(np.ones(4, np.float32))}
    with pytest.raises(CalibrationError, match="the input of lm/a is zero for every sample"):
        ranges_of(dead, "mse")
    assert ranges_of({"lm/b": dead["lm/b"]}, "minmax") == {"lm/b": 1.0}
    assert histogram(np.zeros((0, 4), np.float32)).largest == 0
