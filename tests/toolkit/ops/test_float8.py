"""E4M3 against ml_dtypes, ONNX's reference and torch: every code, ties, subnormals, saturation."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from edgevlm.toolkit.ops import float8
from edgevlm.toolkit.ops.vocabulary import Array

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
CODES = np.arange(256, dtype=np.uint8)
NUMBERS = CODES[(CODES & 0x7F) != 0x7F]


def theirs(x: Array) -> Array:
    """Codes by ml_dtypes, which has no saturation of its own."""
    return np.clip(x, -448, 448).astype(E4M3).view(np.uint8)


def floats() -> Array:
    """Of every size, and all values halfway between two neighbours with those next to them."""
    generator = np.random.default_rng(8)
    sizes = generator.standard_normal(200_000) * 2.0 ** generator.integers(-16, 12, 200_000)
    values = np.sort(float8.decode(NUMBERS[:127]))
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middle, np.float32(end)) for end in (0, 1e9)]
    ends = [0.0, 448, 463.9, 464, 464.1, 1e5, np.inf, 2.0**-9, 2.0**-10, 1e-30, 1e-45]
    found = np.concatenate([sizes, middle, *near, ends]).astype(np.float32)
    return np.concatenate([found, -found])


def test_every_code_is_the_value_that_ml_dtypes_gives() -> None:
    np.testing.assert_array_equal(float8.decode(CODES), CODES.view(E4M3).astype(np.float32))
    assert np.isnan(float8.decode(np.asarray([0x7F, 0xFF], np.uint8))).all()
    assert np.abs(float8.decode(NUMBERS)).max() == float8.LARGEST
    assert np.signbit(float8.decode(np.asarray([0x80], np.uint8)))[0]


def test_every_value_rounds_to_itself() -> None:
    values = float8.decode(NUMBERS)
    np.testing.assert_array_equal(float8.encode(values), NUMBERS)
    np.testing.assert_array_equal(float8.rounded(values), values)
    float8.check(NUMBERS)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_rounding_is_ml_dtypes(dtype: type) -> None:
    with np.errstate(over="ignore"):
        x: Array = floats().astype(dtype)
    single = x.astype(np.float32)
    np.testing.assert_array_equal(float8.encode(x), theirs(single))
    np.testing.assert_array_equal(float8.rounded(x), float8.decode(theirs(single)))
    assert (np.signbit(float8.rounded(x)) == np.signbit(single)).all()  # zeros too


def test_rounding_is_onnxs_and_torchs() -> None:
    x = floats()
    zero = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    step = onnx.numpy_helper.from_array(np.asarray(0.25, np.float32), "s")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [step, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    (found,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_array_equal(float8.rounded(x / 0.25) * np.float32(0.25), found)
    inside = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(float8.encode(x), inside.view(torch.uint8).numpy())


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)])
def test_shapes_stay(shape: tuple[int, ...]) -> None:
    x = np.full(shape, 3.3, np.float32)
    codes = float8.encode(x)
    assert codes.shape == shape
    assert codes.dtype == np.uint8
    assert float8.rounded(x).shape == float8.decode(codes).shape == shape
    assert (float8.rounded(x) == 3.25).all()


def test_nan_has_no_nearest_value() -> None:
    for function in (float8.encode, float8.rounded):
        with pytest.raises(ValueError, match="NaN cannot be rounded"):
            function(np.asarray([1, np.nan], np.float32))
    with pytest.raises(ValueError, match="2 of 3 FP8 codes are NaN"):
        float8.check(np.asarray([0x7F, 3, 0xFF], np.uint8))
