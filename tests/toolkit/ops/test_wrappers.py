"""The wrappers: one model function calibrates, quantizes, records Q/DQ, and counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Weights
from edgevlm.toolkit.ops.wrappers import Observe
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule
from edgevlm.toolkit.quantization.quantize import Quantize
from edgevlm.toolkit.vlm.components import Component
from edgevlm.toolkit.vlm.cost import count
from edgevlm.training.torch_ops import TorchOps
from tests.onnx_tools import model_of, run
from tests.toolkit.models.test_architectures import component, feed, tensors

ARCHITECTURES = [("encoders", "clip"), ("mergers", "mlp"), ("lms", "llama")]


def calibrated(
    part: Component, weights: dict[str, Array], inputs: dict[str, Array]
) -> PrecisionPlan:
    """A plan that quantizes everything, with ranges observed on one call."""
    return PrecisionPlan("int8", ranges=largest(part, weights, inputs), method="minmax", samples=1)


def largest(
    part: Component, weights: dict[str, Array], *calls: dict[str, Array]
) -> dict[str, float]:
    """The largest |x| that entered each layer."""
    found: dict[str, float] = {}

    def see(path: str, x: Array) -> None:
        found[path] = max(found.get(path, 0.0), float(np.abs(x).max()))

    observer: Any = Observe(NumpyOps(), part.name, see)
    for inputs in calls:
        part.forward(observer, Weights(weights), inputs)
    return found


def quantized(part: Component, plan: PrecisionPlan, weights: dict[str, Array]) -> Component:
    """The same component with the plan applied to whatever ops run it."""

    def forward(op: Ops[Any], w: Weights[Any], inputs: Any) -> dict[str, Any]:
        wrapped: Any = Quantize(op, part.name, plan, weights.__getitem__)
        return part.forward(wrapped, w, inputs)

    return replace(part, forward=forward)


@pytest.mark.parametrize(("role", "kind"), ARCHITECTURES)
def test_the_int8_reference_is_the_recorded_qdq_graph(role: str, kind: str) -> None:
    part = component(role, kind)
    weights, inputs = tensors(part), feed(part)
    exact = part.forward(NumpyOps(), Weights(weights), inputs)
    small = quantized(part, calibrated(part, weights, inputs), weights)
    expected = small.forward(NumpyOps(), Weights(weights), inputs)
    model = model_of(small, weights)
    kinds = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    found = run(model, inputs)
    for port in part.outputs:
        if port.updates:
            continue
        scale = np.abs(exact[port.name]).max()
        # Rounding may fall the other way at a tie: a step of one place, not a different model.
        assert np.abs(found[port.name] - expected[port.name]).max() < 0.02 * scale
        assert 1e-4 * scale < np.abs(expected[port.name] - exact[port.name]).max() < 0.3 * scale


def test_qat_reaches_the_weights_through_the_rounding() -> None:
    part = component("mergers", "mlp")
    weights, inputs = tensors(part), feed(part)
    small = quantized(part, calibrated(part, weights, inputs), weights)
    parameters = {k: torch.nn.Parameter(torch.from_numpy(v)) for k, v in weights.items()}
    given = {k: torch.from_numpy(v) for k, v in inputs.items()}
    found = small.forward(TorchOps(), Weights(parameters), given)["features"]
    expected = small.forward(NumpyOps(), Weights(weights), inputs)["features"]
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=0.02 * np.abs(expected).max())
    torch.autograd.backward(found.square().mean())
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_rules_decide_by_place_and_the_last_one_wins() -> None:
    plan = PrecisionPlan(
        "float", (Rule("lm/*", "int8"), Rule("lm/layers.0/*", "float"), Rule("*/mlp/up", "int8"))
    )
    assert plan.at("encoder.clip/patch") == "float"
    assert plan.at("lm/head") == "int8"
    assert plan.at("lm/layers.0/attention/q") == "float"
    assert plan.at("lm/layers.0/mlp/up") == "int8"


def test_a_place_left_in_float_is_untouched() -> None:
    part = component("mergers", "mlp")
    weights, inputs = tensors(part), feed(part)
    plan = calibrated(part, weights, inputs)
    mixed = replace(plan, rules=(Rule("merger/linears.1", "float"),))
    model = model_of(quantized(part, mixed, weights), weights)
    quantize = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    places = {"/".join(node.name.split("/")[1:3]) for node in quantize}
    assert "linears.0/input" in places
    assert "linears.1/input" not in places
    onnx.checker.check_model(model, full_check=True)


def test_a_place_without_a_range_is_refused() -> None:
    part = component("mergers", "mlp")
    weights = tensors(part)
    small = quantized(part, PrecisionPlan("int8"), weights)
    with pytest.raises(CalibrationError, match=r"merger/linears\.0"):
        small.forward(NumpyOps(), Weights(weights), feed(part))


def test_observe_shows_the_inputs_of_every_call() -> None:
    part = component("mergers", "mlp")
    weights, inputs = tensors(part), feed(part)
    calls = [{k: factor * v for k, v in inputs.items()} for factor in (1.0, 3.0, 2.0)]
    expected = max(np.abs(v).max() for v in inputs.values())
    found = largest(part, weights, *calls)
    assert found["merger/linears.0"] == pytest.approx(3 * expected)


def test_count_is_the_arithmetic_of_the_shapes() -> None:
    part = component("mergers", "mlp")
    tiles, tokens = 2, part.inputs[0].shape[1]
    assert isinstance(tokens, int)
    counter = count(part, {"tiles": tiles, "rows": 1})
    first, second = 56 * 48, 48 * 48
    products = [c for c in counter.costs if c.op == "linear" and "/linears." in c.path]
    rows = tiles * tokens
    assert [c.flops for c in products] == [rows * (2 * n + 48) for n in (first, second)]
    assert [c.matrix_elements for c in products] == [first, second]
    assert [c.weight_elements for c in products] == [first + 48, second + 48]
    assert [cost.path for cost in products] == ["merger/linears.0", "merger/linears.1"]


def test_count_of_a_causal_prompt_is_half_of_the_square() -> None:
    part = component("lms", "llama")
    axes = {"batch": 1, "rows": 1, "scored": 1, "context": 10}
    one = [c for c in count(part, axes | {"sequence": 1}).costs if c.op == "attention_cached"]
    ten = [c for c in count(part, axes | {"sequence": 10}).costs if c.op == "attention_cached"]
    pair = 4 * 64 + 6 * 4  # 64 channels in 4 heads: two products, a scale and a softmax
    rotation = 3 * (64 + 32)
    assert one[0].flops == pair * 10 + rotation
    assert ten[0].flops == pair * sum(range(1, 11)) + 10 * rotation
