"""Greedy agreement: answers token by token, and what another model would choose at each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edgevlm.calibration import greedy
from edgevlm.calibration.greedy import ANSWER, Agreement
from edgevlm.calibration.many import ManyOps
from edgevlm.calibration.many import hidden as float_states
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.vlm.components import Component, lm_component
from edgevlm.training import forward

PROMPTS = np.random.default_rng(3).integers(0, 200, (3, 8))


@pytest.fixture(scope="module")
def model(ready: Path) -> tuple[Component, Mapping[str, Array]]:
    bundle = Bundle.open(ready / "bundle")
    return lm_component(bundle.vlm.lm), dict(bundle.tensors("lm"))


def inputs(prompts: Array, lm: Component) -> dict[str, Array]:
    width = lm.shapes["embed.weight"][1]
    features = np.zeros((1, width), np.float32)
    return {"ids": prompts, "rows": np.full_like(prompts, -1), "features": features}


def one_by_one(lm: Component, weights: Mapping[str, Array], prompt: Array) -> list[int]:
    """The plain way: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(ANSWER):
        state = float_states(lm, ManyOps(), weights, np.array([ids]))[0]
        w: Weights[Array] = Weights(weights)
        tied = "head.weight" not in lm.shapes
        ops = NumpyOps()
        logits = ops.unembed(state[0], w / "embed") if tied else ops.linear(state[0], w / "head")
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :]


def moved(weights: Mapping[str, Array], by: float) -> dict[str, Array]:
    generator = np.random.default_rng(0)
    return {
        key: x + by * np.float32(x.std()) * generator.standard_normal(x.shape, np.float32)
        if x.ndim == 2 and key.startswith("layers")
        else x
        for key, x in weights.items()
    }


def test_answers_are_those_of_the_whole_text_read_again(
    model: tuple[Component, Mapping[str, Array]],
) -> None:
    lm, weights = model
    found = greedy.answered(lm, NumpyOps(), weights, inputs(PROMPTS, lm))
    assert found.shape == (3, ANSWER)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert answer.tolist() == one_by_one(lm, weights, prompt)


def test_torch_gives_the_same(model: tuple[Component, Mapping[str, Array]]) -> None:
    found = forward.interpreter()
    if found is None:
        pytest.skip("torch is not installed")
    ops, load, read = found
    lm, weights = model
    tensors = {key: load(np.array(x)) for key, x in weights.items()}
    given = inputs(PROMPTS, lm)
    said = greedy.answered(lm, ops, tensors, given, load, read)
    assert said.tolist() == greedy.answered(lm, NumpyOps(), weights, given).tolist()


@pytest.mark.parametrize("by", [0.0, 0.02, 0.3])
def test_one_pass_says_what_generating_would(
    by: float, model: tuple[Component, Mapping[str, Array]]
) -> None:
    lm, weights = model
    other = moved(weights, by)
    found = greedy.compare(lm, weights, other, PROMPTS)
    until = []
    for prompt in PROMPTS:
        pair = (one_by_one(lm, w, prompt) for w in (weights, other))
        same = [a == b for a, b in zip(*pair, strict=True)]
        until.append([*same, False].index(False))
    whole = sum(count == ANSWER for count in until)
    assert found == Agreement(3, ANSWER, whole, float(np.mean(until)))
    if not by:
        assert found.same == 3
    if by == 0.3:
        assert found.same < 3


def test_prompts_are_beginnings_of_pieces_of_windows() -> None:
    windows = np.arange(8 * 256).reshape(8, 256)
    found = greedy.prompts_of(windows)
    assert found.shape == (24, greedy.PROMPT)
    assert len({row.tobytes() for row in found}) == 24
    assert all((np.diff(row) == 1).all() for row in found)
    assert greedy.prompts_of(windows[:1, :20]).shape == (1, 20)
    assert len(greedy.prompts_of(np.zeros((40, 16), np.int64))) == 24
