"""Graphs for ONNX Runtime 1.23, the last release for Python 3.10: opset 23, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from edgevlm.engines.lowering.lower import check_allowed, decide, lower
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.target import Target
from tests.onnx_tools import model_of, run
from tests.ops_cases import CASES

OLD = Target("onnxruntime", (1, 23, 2), "x86_64")
REFUSED = {
    "attention_cached heads of any width": "edgevlm.CachedAttention",
    "attention_cached window, one token": "edgevlm.CachedAttention",
    "attention_cached window, prompt": "edgevlm.CachedAttention",
    "fake_quant": "QuantizeLinear",
    "fake_quant per channel": "QuantizeLinear",
    "fake_quant to fp8": "QuantizeLinear",
}


@pytest.mark.parametrize("name", sorted(CASES.keys() - REFUSED.keys()))
def test_what_it_takes_is_of_opset_23_and_equals_the_reference(name: str) -> None:
    case = CASES[name]
    model = model_of(case.component(), case.weights())
    decide("case", model, OLD)
    model = lower(model, OLD)
    check_allowed("case", model, OLD)
    assert {o.version for o in model.opset_import if not o.domain} == {23}
    found, expected = run(model, case.feed()), case.outputs()
    for output, rows in case.matters.items():
        found[output], expected[output] = found[output] * rows, expected[output] * rows
    for output, array in expected.items():
        scale = max(1.0, float(np.abs(array).max()))
        np.testing.assert_allclose(found[output], array, atol=2e-6 * scale, rtol=0)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_it_lacks_is_refused_by_name(name: str) -> None:
    model = model_of(CASES[name].component(), CASES[name].weights())
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        decide("case", model, OLD)
