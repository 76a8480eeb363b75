"""Drawing a token: which survive, how often each comes, and that a seed repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as warpers

from edgevlm.engines.backends.common import best_seconds
from edgevlm.engines.runtime import sampling as module
from edgevlm.engines.runtime.sampling import Sampling, best, draw, sampler, survivors
from edgevlm.toolkit.errors import AccuracyError, ConfigError
from edgevlm.toolkit.ops.vocabulary import Array

# Logits without ties: what survives is then a matter of rank alone.
RANKED = st.integers(2, 30).flatmap(
    lambda n: st.permutations(range(n)).map(lambda p: np.asarray(p, np.float32) * 0.37 - 3)
)


def drawn_from(logits: Array, sampling: Sampling) -> dict[int, float]:
    """Each surviving token's probability."""
    sampling.check()
    ids, weights = survivors(logits, sampling)
    shares = (weights.astype(np.float64) / weights.sum(dtype=np.float64)).tolist()
    numbers = range(len(logits)) if ids is None else ids.tolist()
    return {i: share for i, share in zip(numbers, shares, strict=True) if share > 0}


def by_definition(logits: Array, s: Sampling) -> dict[int, float]:
    """The same in float64 with a full sort; of equal logits the first ones are the best."""
    scaled = (logits.astype(np.float64) - float(logits.max())) / s.temperature
    order = np.argsort(-scaled, kind="stable").tolist()
    kept = order[: s.top_k or None]
    weights = dict(zip(kept, np.exp(scaled[kept]).tolist(), strict=True))
    total, reached, nucleus = sum(weights.values()), 0.0, []
    for i in kept:
        if reached >= s.top_p * total * (1 - 1e-12):
            break
        nucleus.append(i)
        reached += weights[i]
    survive = {i: weights[i] for i in (kept if s.top_p == 1 else nucleus) if weights[i] > 0}
    whole = sum(survive.values())
    return {i: weight / whole for i, weight in survive.items()}


def by_transformers(logits: Array, s: Sampling) -> dict[int, float]:
    """The same by transformers' warpers, in the order in which `generate` applies them."""
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    chain: list[Any] = [warpers.TemperatureLogitsWarper(s.temperature)]
    chain += [warpers.TopKLogitsWarper(s.top_k)] if s.top_k else []
    chain += [warpers.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    found, ids = scores, torch.zeros((1, 1), dtype=torch.long)
    for warper in chain:
        found = warper(ids, found)
    probabilities = found.softmax(-1)[0]
    kept = torch.isfinite(found[0]).nonzero()[:, 0]
    return {int(i): float(probabilities[i]) for i in kept}


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    RANKED,
    st.floats(0.2, 3),
    st.sampled_from([0, 1, 2, 5, 100]),
    st.sampled_from([1.0, 0.9, 0.5, 1e-9]),
)
def test_what_survives_is_what_survives_in_transformers(
    logits: Array, temperature: float, top_k: int, top_p: float
) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    found = drawn_from(logits, sampling)
    assert found == pytest.approx(by_transformers(logits, sampling), abs=1e-9)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(RANKED, st.floats(0.05, 0.99))
def test_top_p_keeps_the_fewest_that_reach_it(logits: Array, top_p: float) -> None:
    found = drawn_from(logits, Sampling(1.0, 0, top_p))
    weights = np.exp(logits.astype(np.float64))
    weights /= weights.sum()
    best_first = sorted(range(len(logits)), key=lambda i: -logits[i])
    fewest = next(
        n for n in range(1, len(logits) + 1) if weights[best_first[:n]].sum() >= top_p - 1e-12
    )
    assert set(found) == set(best_first[:fewest])


@settings(deadline=None, max_examples=100, derandomize=True)
@given(RANKED, st.integers(1, 40))
def test_top_k_keeps_the_best(logits: Array, top_k: int) -> None:
    found = drawn_from(logits, Sampling(1.0, top_k))
    assert set(found) == set(sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k])
    assert sum(found.values()) == pytest.approx(1)


def test_top_k_comes_before_top_p() -> None:
    """Of 0.4 0.3 0.2 0.1 the best two are 4/7 and 3/7 of what is left: 0.5 is reached by one."""
    logits = np.log(np.asarray([0.1, 0.4, 0.2, 0.3], np.float32))
    assert set(drawn_from(logits, Sampling(1.0, 2, 0.5))) == {1}
    assert set(drawn_from(logits, Sampling(1.0, 0, 0.5))) == {1, 3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    logits = np.log(np.asarray([0.5, 0.25, 0.15, 0.1], np.float32))
    expected = np.asarray([0.5, 0.25, 0.15, 0.1]) ** (1 / temperature)
    expected /= expected.sum()
    draw, count = sampler(Sampling(temperature, seed=3)), 4000
    found = np.bincount([draw(logits) for _ in range(count)], minlength=4)
    chi_square = (((found - count * expected) ** 2) / (count * expected)).sum()
    assert chi_square < 16.3  # three degrees of freedom: passed by one in a thousand


def test_greedy_takes_the_best_and_the_first_of_equals() -> None:
    greedy = sampler(Sampling())
    assert greedy(np.asarray([0.1, 3.0, 3.0, -1.0], np.float32)) == 1
    assert greedy(np.asarray([-np.inf, -5.0], np.float32)) == 1


def test_a_seed_repeats_and_another_differs() -> None:
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)

    def answer(seed: int | None) -> list[int]:
        draw = sampler(Sampling(1.5, seed=seed))
        return [draw(logits) for _ in range(20)]

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)
    assert answer(None) != answer(None)


def test_a_small_temperature_is_nearly_greedy_and_tokens_may_be_ruled_out() -> None:
    logits = np.asarray([1.0, 1.5, -np.inf, 1.49], np.float32)
    draw = sampler(Sampling(1e-4, seed=1))
    assert {draw(logits) for _ in range(50)} == {1}
    warm = sampler(Sampling(50.0, seed=1))
    assert {warm(logits) for _ in range(200)} == {0, 1, 3}


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        (Sampling(-0.1), "--temperature"),
        (Sampling(float("nan")), "--temperature"),
        (Sampling(float("inf")), "--temperature"),
        (Sampling(1.0, top_p=0.0), "--top-p"),
        (Sampling(1.0, top_p=1.1), "--top-p"),
        (Sampling(1.0, top_p=float("nan")), "--top-p"),
        (Sampling(1.0, top_k=-1), "--top-k"),
        (Sampling(0.0, top_k=5), "--top-k"),
        (Sampling(0.0, top_p=0.5), "--top-p"),
        (Sampling(1.0, seed=-1), "--seed"),
        (Sampling("1"), "--temperature '1' is not a number"),  # type: ignore[arg-type]
        (Sampling(None), "--temperature None"),  # type: ignore[arg-type]
        (Sampling(1.0, 2.5), "--top-k 2.5 is not a whole number"),  # type: ignore[arg-type]
        (Sampling(1.0, 0, "p"), "--top-p 'p'"),  # type: ignore[arg-type]
        (Sampling(1.0, seed=0.5), "--seed 0.5"),  # type: ignore[arg-type]
    ],
)
def test_values_without_a_meaning_are_refused(sampling: Sampling, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        sampler(sampling)


# -- large vocabularies: thresholds instead of sorting ------------------------------------------

KINDS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda g, n: g.normal(size=n) * 3,
    "nearly flat": lambda g, n: g.normal(size=n) * 0.3,
    "peaked": lambda g, n: g.normal(size=n) * 9,
    "sorted": lambda g, n: np.sort(g.normal(size=n)),
    "ties": lambda g, n: g.integers(-6, 6, n) * 0.5,
    "all equal": lambda g, n: np.full(n, 2.5),
    "half ruled out": lambda g, n: np.where(g.random(n) < 0.5, -np.inf, g.normal(size=n)),
}
SETTINGS = [
    Sampling(1.0),
    Sampling(0.7, 50),
    Sampling(1.0, 1),
    Sampling(1.3, 3000),
    Sampling(1.0, 15000),
    Sampling(1.0, 0, 0.9),
    Sampling(1.0, 0, 0.5),
    Sampling(2.0, 0, 0.999),
    Sampling(0.3, 0, 0.05),
    Sampling(1.0, 40, 0.8),
    Sampling(1.0, 9000, 0.7),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_vocabulary_is_drawn_from_by_the_same_definition(
    kind: str, setting: Sampling
) -> None:
    """Rounding in float32 may move the edge of a nucleus by a token or two, whose probability is
    part of the distance; without top-p the same tokens survive.
    """
    for seed, count in ((0, 20011), (1, 5000)):
        logits = KINDS[kind](np.random.default_rng(seed), count).astype(np.float32)
        expected, found = by_definition(logits, setting), drawn_from(logits, setting)
        if setting.top_p == 1:
            assert found.keys() == expected.keys()
        assert abs(len(found) - len(expected)) <= 2
        tokens = expected.keys() | found.keys()
        distance = sum(abs(found.get(i, 0.0) - expected.get(i, 0.0)) for i in tokens)
        assert distance < 2e-4


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=60),
    st.integers(0, 70),
    st.sampled_from([1.0, 0.93, 0.61, 0.37, 1e-9]),
)
def test_ties_and_the_search_for_a_threshold_in_small(
    values: list[int], top_k: int, top_p: float
) -> None:
    """The ways of a large vocabulary, made to be taken by a small one."""
    logits = np.asarray(values, np.float32)
    setting = Sampling(0.9, top_k, top_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_EXACT", 2)
        patch.setattr(module, "_LIKELY", 3)
        patch.setattr(module, "_STRIDE", 2)
        patch.setattr(module, "_BLOCK", 4)
        found = drawn_from(logits, setting)
    expected = by_definition(logits, setting)
    assert found == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=200), st.data())
def test_the_best_are_the_first_of_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    found = best(np.asarray(values, np.float32), count).tolist()
    assert found == sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any), st.floats(0, 0.999999))
def test_a_draw_is_where_the_running_sum_passes(weights: list[int], uniform: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", 8)
        found = draw(np.asarray(weights, np.float32), uniform)
    point, total = uniform * sum(weights), 0
    expected = -1
    while total <= point:
        expected += 1
        total += weights[expected]
    assert found == expected


def test_a_draw_never_ends_on_a_token_without_weight() -> None:
    weights = np.zeros(2000, np.float32)
    weights[[3, 700, 1500]] = [1e-3, 1.0, 0.1]
    just_below_one = float(np.nextafter(1, 0))
    found = {draw(weights, u) for u in (0.0, 1e-9, 0.5, 0.99, just_below_one, 1.0)}
    assert found <= {3, 700, 1500}


@pytest.mark.parametrize(
    "setting", [Sampling(1.0), Sampling(1.0, 200), Sampling(1.0, 0, 0.95), Sampling(1.0, 9000, 0.9)]
)
def test_a_large_vocabulary_is_drawn_from_as_often_as_it_should(setting: Sampling) -> None:
    """Chi-square over 20 groups of tokens of nearly equal probability."""
    logits = np.random.default_rng(3).normal(size=20000).astype(np.float32) * 2
    expected = by_definition(logits, setting)
    tokens = np.random.default_rng(4).permutation(list(expected)).tolist()
    ends = np.cumsum([expected[token] for token in tokens])
    groups = dict(zip(tokens, (ends * 19.999).astype(int).tolist(), strict=True))
    shares = np.zeros(20)
    for token, group in groups.items():
        shares[group] += expected[token]
    sample, count = sampler(Sampling(1.0, setting.top_k, setting.top_p, seed=11)), 4000
    found = np.zeros(20)
    for _ in range(count):
        found[groups[sample(logits)]] += 1
    wanted, filled = count * shares, shares > 0
    chi_square = float(((found - wanted) ** 2)[filled] @ (1 / wanted[filled]))
    assert filled.sum() > 12
    assert chi_square < 43.8  # 19 degrees of freedom: passed by one in a thousand


@pytest.mark.parametrize("count", [7, 20000])
@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-40, 1e-20, 1e20, 1e39, 1e308])
def test_extreme_temperatures_are_greedy_or_flat(temperature: float, count: int) -> None:
    logits = np.random.default_rng(0).permutation(count).astype(np.float32)
    found = drawn_from(logits, Sampling(temperature))
    if temperature < 1:
        assert found == {int(logits.argmax()): 1.0}
    else:
        assert len(found) == count
        assert max(found.values()) == pytest.approx(1 / count)


def test_odd_numbers_are_drawn_with() -> None:
    logits = np.random.default_rng(0).normal(size=6000).astype(np.float32)
    for setting in (
        Sampling(1.0, 10**30),
        Sampling(1.0, 0, 1e-320),
        Sampling(1.0, 0, float(np.nextafter(1, 0))),
        Sampling(1.0, seed=10**40),
        Sampling(np.float32(0.5), np.int64(5), np.float64(0.5), np.int32(3)),
    ):
        assert 0 <= sampler(setting)(logits) < 6000
    assert drawn_from(logits, Sampling(1.0, 0, 1e-320)).keys() == {int(logits.argmax())}


@pytest.mark.parametrize("setting", [Sampling(), Sampling(1.0), Sampling(1.0, 5, 0.5)])
def test_logits_that_are_no_numbers_are_an_error(setting: Sampling) -> None:
    for odd in ([1.0, np.nan, 2.0], [-np.inf, -np.inf], [np.nan]):
        with pytest.raises(AccuracyError, match="no token to choose"):
            sampler(setting)(np.asarray(odd, np.float32))


@pytest.mark.parametrize(
    "setting",
    [Sampling(1.0, seed=0), Sampling(0.7, 50, 0.9, 0), Sampling(0.7, 0, 0.9, 0), Sampling(1, 50)],
    ids=str,
)
def test_a_token_costs_far_less_than_sorting_the_vocabulary(setting: Sampling) -> None:
    """At 152,000 rows; machines differ, so the measure is one full sort of them in float64."""
    logits = np.random.default_rng(0).normal(size=151_936).astype(np.float32) * 3
    draw_one = sampler(setting)
    ours = best_seconds(lambda: draw_one(logits), 20)
    plain = best_seconds(lambda: np.argsort(-logits.astype(np.float64), kind="stable"), 5)
    assert ours < plain / 3
