"""Drawing a token: which survive, how often each comes, and that a seed repeats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as warpers

from edgevlm.engines.runtime.sampling import Sampling, sampler
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.ops.vocabulary import Array

# Logits without ties: what survives is then a matter of rank alone.
RANKED = st.integers(2, 30).flatmap(
    lambda n: st.permutations(range(n)).map(lambda p: np.asarray(p, np.float32) * 0.37 - 3)
)


class Recorder:
    """Stands in for NumPy's generator and keeps what it was asked to draw from."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def choice(self, values: Array, p: Array) -> int:
        self.seen = dict(zip(values.tolist(), p.tolist(), strict=True))
        return int(values[0])


def drawn_from(logits: Array, sampling: Sampling, patch: pytest.MonkeyPatch) -> dict[int, float]:
    """Each surviving token's probability."""
    recorder = Recorder()
    with patch.context() as p:
        p.setattr(np.random, "default_rng", lambda seed: recorder)
        sampler(sampling)(logits)
    return recorder.seen


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
    with pytest.MonkeyPatch.context() as patch:
        found = drawn_from(logits, sampling, patch)
    assert found == pytest.approx(by_transformers(logits, sampling), abs=1e-9)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(RANKED, st.floats(0.05, 0.99))
def test_top_p_keeps_the_fewest_that_reach_it(logits: Array, top_p: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = drawn_from(logits, Sampling(1.0, 0, top_p), patch)
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
    with pytest.MonkeyPatch.context() as patch:
        found = drawn_from(logits, Sampling(1.0, top_k), patch)
    assert set(found) == set(sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k])
    assert sum(found.values()) == pytest.approx(1)


def test_top_k_comes_before_top_p() -> None:
    """Of 0.4 0.3 0.2 0.1 the best two are 4/7 and 3/7 of what is left: 0.5 is reached by one."""
    logits = np.log(np.asarray([0.1, 0.4, 0.2, 0.3], np.float32))
    with pytest.MonkeyPatch.context() as patch:
        assert set(drawn_from(logits, Sampling(1.0, 2, 0.5), patch)) == {1}
        assert set(drawn_from(logits, Sampling(1.0, 0, 0.5), patch)) == {1, 3}


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
    ],
)
def test_values_without_a_meaning_are_refused(sampling: Sampling, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        sampler(sampling)
