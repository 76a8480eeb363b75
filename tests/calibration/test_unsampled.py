"""Outliers moved from the inputs of int8_rows into weights, without samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgevlm.calibration import unsampled, weight_only
from edgevlm.calibration.chain import Passage, in_numpy
from edgevlm.calibration.smooth import Changed
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.goldens import relative_rms
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import channels
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.vlm.components import Component, components
from tests.conftest import golden_case

CHECKPOINTS = {
    "e2e_llava15": "llava-v1.5-tiny",
    "e2e_convllava": "convllava-tiny",
    "e2e_mmfuser": "mmfuser-tiny",
}
ROWS = weight_only.plan(weight_only.ROWS)


def loaded(case: str, plan: PrecisionPlan = ROWS) -> Source:
    folder = golden_case(case)
    found = [path.parent for path in sorted(folder.rglob("config.json"))]
    llava = next(path for path in found if (path / "tokenizer_config.json").exists())
    return replace(systems.load(llava, Options()), plan=plan)


def inputs_of(part: Component) -> dict[str, Array]:
    generator = np.random.default_rng(7)
    if any(port.updates for port in part.outputs):
        vocab = part.shapes["embed.weight"][0]
        return unsampled._read(part, generator.integers(0, vocab, (1, 24)))
    return unsampled._values(part, generator, {})


def outputs(part: Component, weights: Mapping[str, Array]) -> list[Array]:
    found = Passage({part.name: weights}, in_numpy()).run(part, inputs_of(part))
    return list(found.values())


@pytest.mark.parametrize("case", sorted(CHECKPOINTS))
def test_in_float_the_model_stays_the_same(case: str) -> None:
    source = loaded(case)
    made, changed = unsampled.smoothed(source), []
    for part in components(source.model):
        before, after = (s.weights.get(part.name, {}) for s in (source, made))
        pairs = zip(outputs(part, after), outputs(part, before), strict=True)
        assert relative_rms(list(pairs)) < 1e-5, part.name
        changed += [part.name] if isinstance(after, Changed) else []
    assert "lm" in changed
    assert any(name.startswith("encoder.") for name in changed)


def rounded(weights: Mapping[str, Array], part: Component) -> float:
    """What rounding inputs and weights of the linears costs: the error of the outputs."""

    class Rounding:
        """NumPy with every linear of the layers as int8_rows has it."""

        def __init__(self, inner: object) -> None:
            self._inner = inner

        def __getattr__(self, op: str) -> object:
            return getattr(self._inner, op)

        def block(self, function, w, *args):  # type: ignore[no-untyped-def]
            return function(self, w, *args)

        def linear(self, x, w):  # type: ignore[no-untyped-def]
            matrix = w["weight"].astype(np.float32)
            steps = channels.scales(matrix)
            codes = np.concatenate(list(channels.codes(matrix, steps)))
            w = w.replacing(weight=channels.dequantize(codes, steps))
            return self._inner.linear(channels.round_rows(x), w)  # type: ignore[attr-defined]

    by = Passage({part.name: weights}, in_numpy(), lambda ops, _: Rounding(ops))
    found = by.run(part, inputs_of(part)).values()
    return relative_rms(list(zip(found, outputs(part, weights), strict=True)))


def test_outlier_channels_cost_less() -> None:
    source = loaded("e2e_llava15")
    lm = components(source.model)[-1]
    own = dict(source.weights["lm"])
    for key in [k for k in own if k.startswith("layers.") and ".norm" in k]:
        own[key] = own[key].astype(np.float32).copy()
        own[key][5] *= 40  # a loud channel, as trained models have
    source = replace(source, weights={**source.weights, "lm": own})
    plain = rounded(own, lm)
    smooth = rounded(unsampled.smoothed(source).weights["lm"], lm)
    assert smooth < 0.8 * plain


def test_what_is_not_by_rows_is_left_alone() -> None:
    for kind in ("int8", "int4"):
        source = loaded("e2e_llava15", weight_only.plan(kind))
        made = unsampled.smoothed(source)
        assert all(made.weights[name] is source.weights[name] for name in source.weights)
    vision = weight_only.with_vision(weight_only.plan("int4"), source.model)
    made = unsampled.smoothed(replace(source, plan=vision))
    assert made.weights["lm"] is source.weights["lm"]
    assert isinstance(made.weights["encoder.clip"], Changed)


def test_the_same_every_time(tmp_path: Path) -> None:
    source = loaded("e2e_mmfuser")
    one, two = (unsampled.smoothed(source).weights["lm"] for _ in range(2))
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])


def test_the_language_model_reads_a_page_and_random_tokens() -> None:
    source = loaded("e2e_llava15")
    windows = unsampled._windows(source)
    assert 2 <= len(windows) <= 7
    assert windows.shape[1] == min(64, source.model.lm.config.context)
    assert windows.max() < source.model.lm.config.vocab_size
