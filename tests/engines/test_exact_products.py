"""8-bit products are exact on the machine at hand, whatever its processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgevlm.engines.backends import sessions
from edgevlm.toolkit.ops.vocabulary import Array
from tests.conftest import ROOT

ROWS, INPUTS, OUTPUTS = 5, 256, 64


def operands(generator: np.random.Generator) -> tuple[Array, Array]:
    """Near the ends of their ranges, signs in runs: sums of two products exceed 16 bits."""
    x = generator.integers(250, 256, (ROWS, INPUTS)).astype(np.uint8)
    size = generator.integers(120, 128, (INPUTS, OUTPUTS))
    sign = np.where(np.arange(INPUTS)[:, None] // 8 % 3 == 2, -1, 1)
    return x, (size * sign).astype(np.int8)


def run(nodes: list[onnx.NodeProto], tensors: dict[str, Array], x: Array, kind: int) -> Array:
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", kind, [ROWS, OUTPUTS])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (found,) = sessions.open_session(model.SerializeToString()).run(None, {"x": x})
    return np.asarray(found)


def exact(x: Array, w: Array, zero_point: int = 0) -> Array:
    return np.asarray((x.astype(np.int64) - zero_point) @ w.astype(np.int64))


def test_the_case_would_saturate_in_16_bits(generator: np.random.Generator) -> None:
    """What AVX2 without VNNI computes is far from the truth: the tests below can fail."""
    x, w = operands(generator)
    products = x.astype(np.int64)[:, :, None] * w.astype(np.int64)[None]
    pairs = products.reshape(ROWS, INPUTS // 2, 2, OUTPUTS).sum(2)
    wrong = np.clip(pairs, -(1 << 15), (1 << 15) - 1).sum(1)
    difference = np.abs(wrong - exact(x, w)).max() / np.abs(exact(x, w)).max()
    assert difference > 0.4


def test_integer_products_are_exact(generator: np.random.Generator) -> None:
    x, w = operands(generator)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    np.testing.assert_array_equal(run([node], {"w": w}, x, TensorProto.INT32), exact(x, w))


def qdq(label: str, x: str, scale: str, zero: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [x, scale, zero], [f"{label}.q"]),
        helper.make_node("DequantizeLinear", [f"{label}.q", scale, zero], [f"{label}.f"]),
    ]


@pytest.mark.parametrize("zero_point", [0, 3])
def test_products_of_a_quantized_graph_are_exact(
    zero_point: int, generator: np.random.Generator
) -> None:
    """Q/DQ around a MatMul, which ONNX Runtime makes one 8-bit product."""
    codes, w = operands(generator)
    x = (codes.astype(np.float32) - zero_point) * np.float32(0.125)
    truth = exact(codes, w, zero_point) * (0.125 * 0.25)
    step = np.float32(np.abs(truth).max() / 127)
    tensors: dict[str, Any] = {
        "w": w, "ws": np.float32(0.25), "wz": np.int8(0), "xs": np.float32(0.125),
        "xz": np.uint8(zero_point), "ys": step, "yz": np.uint8(128),
    }  # fmt: skip
    nodes = [
        *qdq("x", "x", "xs", "xz"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["w.f"]),
        helper.make_node("MatMul", ["x.f", "w.f"], ["product"]),
        *qdq("y", "product", "ys", "yz"),
        helper.make_node("Identity", ["y.f"], ["y"]),
    ]
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    found = run(nodes, arrays, x, TensorProto.FLOAT)
    np.testing.assert_allclose(found, truth, atol=0.51 * step)


def test_dynamic_products_are_right(generator: np.random.Generator) -> None:
    codes, w = operands(generator)
    x = codes.astype(np.float32)
    x[:, 0] = 0  # the range is [0, 255]: one step is 1, and every value its own code
    x[0, 1] = 255
    truth = exact(x, w) * 0.5
    tensors = {"w": w, "ws": np.asarray(0.5, np.float32)}
    node = helper.make_node(
        "DynamicQuantizeMatMul", ["x", "w", "ws"], ["y"], domain="com.microsoft"
    )
    found = run([node], tensors, x, TensorProto.FLOAT)
    np.testing.assert_allclose(found, truth, rtol=1e-5)


@pytest.mark.parametrize("saturates", [False, True])
def test_the_setting_follows_the_processor(
    saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "saturates_int8", lambda: saturates)
    options = sessions.session_options()
    if saturates:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(Exception, match="does not have configuration"):
            options.get_session_config_entry("session.x64quantprecision")


def test_every_session_is_made_there() -> None:
    """Whoever opens one by hand forgets the setting."""
    made = "Inference" + "Session("
    folders = ("engines", "export", "toolkit", "training", "calibration", "tests", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    makers = [path for path in files if made in path.read_text()]
    assert makers == [ROOT / "engines/backends/sessions.py"]
