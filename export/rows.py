"""Recording products of 8-bit integers: weights with a scale per output, inputs with one per row.

Two functions, so that what reads one input shares its codes: q, k and v; gate and up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import onnx

from edgevlm.export.nodes import function, ints, node
from edgevlm.toolkit.checkpoints.safetensors_io import TensorSpec
from edgevlm.toolkit.quantization.blockwise import SCALE
from edgevlm.toolkit.quantization.channels import LARGEST, SMALLEST, SUFFIX, ZERO_POINT


class Emitter(Protocol):
    """What is needed of a recorder."""

    def emit(
        self, kind: str, inputs: Sequence[str], name: str = "", outputs: int = 1, **attrs: Any
    ) -> list[str]: ...


class ChannelWeights:
    """The weights of one component that its graph takes by channel, and the inputs in codes."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.used: dict[str, str] = {}
        self._inputs: dict[str, list[str]] = {}

    def product(self, e: Emitter, x: str, weight: str, path: str) -> str:
        """x times a weight, from now on stored by channel."""
        if x not in self._inputs:
            self._inputs[x] = e.emit("edgevlm.RowQuantize", [x], f"{path}/input", 2)
        name = weight + SUFFIX
        self.used[name] = weight
        inputs = [*self._inputs[x], name, name + SCALE]
        return e.emit("edgevlm.RowQuantizedLinear", inputs, path)[0]

    def planned(self, weight: str, dtype: str) -> list[TensorSpec]:
        """The two tensors of a weight in the weights file; none of a weight stored otherwise."""
        name, shape = weight + SUFFIX, self._shapes[weight]
        if name not in self.used:
            return []
        return [TensorSpec(name, "uint8", shape), TensorSpec(name + SCALE, dtype, shape[1:])]


def row_quantize() -> onnx.FunctionProto:
    """Codes of x, uint8 with zero point 128, and a float32 step for each row of its last axis.

    The Slice is for inputs without rows: ONNX Runtime 1.31 reduces an empty tensor to its own
    shape where the axis counts from the end.
    """
    return function(
        "RowQuantize",
        ["x"],
        ["codes", "step"],
        [],
        [
            node("Cast", ["x"], ["f32"], to=onnx.TensorProto.FLOAT),
            node("Abs", ["f32"], ["sizes"]),
            ints("last", -1),
            node("ReduceMax", ["sizes", "last"], ["reduced"], keepdims=1),
            ints("first", 0),
            ints("second", 1),
            node("Slice", ["reduced", "first", "second", "last"], ["largest"]),
            node("Constant", [], ["smallest"], value_float=SMALLEST),
            node("Max", ["largest", "smallest"], ["range"]),
            node("Constant", [], ["steps_in_range"], value_float=float(LARGEST)),
            node("Div", ["range", "steps_in_range"], ["step"]),
            node("Div", ["f32", "step"], ["steps"]),
            node("Round", ["steps"], ["whole"]),
            node("Constant", [], ["zero_point"], value_float=float(ZERO_POINT)),
            node("Add", ["whole", "zero_point"], ["shifted"]),
            node("Cast", ["shifted"], ["codes"], to=onnx.TensorProto.UINT8),
        ],
    )


def row_quantized_linear() -> onnx.FunctionProto:
    """Rows in codes times a weight in codes [inputs, outputs], the product scaled by both steps."""
    zero = onnx.helper.make_tensor("zero", onnx.TensorProto.UINT8, [], [ZERO_POINT])
    return function(
        "RowQuantizedLinear",
        ["codes", "step", "stored", "scale"],
        ["y"],
        [],
        [
            node("Constant", [], ["zero_point"], value=zero),
            node("MatMulInteger", ["codes", "stored", "zero_point", "zero_point"], ["whole"]),
            node("Cast", ["whole"], ["f32"], to=onnx.TensorProto.FLOAT),
            node("Mul", ["f32", "step"], ["rows"]),
            node("Cast", ["scale"], ["scale_f32"], to=onnx.TensorProto.FLOAT),
            node("Mul", ["rows", "scale_f32"], ["product"]),
            node("CastLike", ["product", "scale"], ["y"]),
        ],
    )
