"""Recording static INT8: Q/DQ around the input, and a weight in codes behind DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import onnx
from onnx import helper

from edgevlm.toolkit.checkpoints.safetensors_io import Blocks, TensorSpec, row_blocks
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import static
from edgevlm.toolkit.quantization.blockwise import SCALE
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.quantization.static import INPUT, SUFFIX


class Emitter(Protocol):
    """What is needed of a recorder."""

    small: dict[str, onnx.TensorProto]

    def one(self, kind: str, inputs: Sequence[str], name: str = "", **attrs: Any) -> str: ...


class StaticWeights:
    """The weights of one component that its graph takes in codes, and the steps of their inputs.

    Every layer has Q/DQ of its own around its input, also where several read one: TensorRT joins
    what is the same, and ONNX Runtime makes integer products only where nothing else reads the
    codes.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], plan: PrecisionPlan) -> None:
        self._shapes = shapes
        self._plan = plan
        self.steps: dict[str, Array] = {}

    def operands(self, e: Emitter, x: str, weight: str, path: str) -> tuple[str, str]:
        """x and `weight` as the product at `path` takes them: as they are, or both behind Q/DQ.

        Raises CalibrationError if the plan has no range for the layer.
        """
        if weight not in self._shapes or self._plan.at(path) != "int8":
            return x, weight
        name, shape = weight + SUFFIX, self._shapes[weight]
        self.steps[weight] = static.input_step(self._plan.ranges, path)
        axis = static.channel_axis(shape)
        step = [name + INPUT, _zeros(e, None)]
        codes = e.one("QuantizeLinear", [x, *step], f"{path}/input/quantize")
        rounded = e.one("DequantizeLinear", [codes, *step], f"{path}/input/dequantize")
        stored = [name, name + SCALE, _zeros(e, shape[axis])]
        w = e.one("DequantizeLinear", stored, f"{path}/weight/dequantize", axis=axis)
        return rounded, w

    def planned(self, weight: str, dtype: str) -> list[TensorSpec]:
        """The three tensors of a weight in the weights file; none of a weight stored otherwise."""
        if weight not in self.steps:
            return []
        name, shape = weight + SUFFIX, self._shapes[weight]
        return [
            TensorSpec(name, "int8", shape),
            TensorSpec(name + SCALE, dtype, (shape[static.channel_axis(shape)],)),
            TensorSpec(name + INPUT, dtype, ()),
        ]

    def content(self, tensor: str, weights: Mapping[str, Array]) -> Blocks | None:
        """What one of those tensors holds; None for any other tensor."""
        weight, suffix, tail = tensor.rpartition(SUFFIX)
        if not suffix or weight not in self.steps:
            return None
        if tail == INPUT:
            return row_blocks(self.steps[weight])
        matrix = weights[weight]
        steps = static.scales(matrix)
        return row_blocks(steps) if tail == SCALE else static.codes(matrix, steps)


def _zeros(e: Emitter, count: int | None) -> str:
    """Zero points of so many channels, shared; of a whole tensor for None."""
    name = "zero.int8" if count is None else f"zero.int8.{count}"
    shape = [] if count is None else [count]
    zeros = helper.make_tensor(name, onnx.TensorProto.INT8, shape, bytes(count or 1), raw=True)
    e.small.setdefault(name, zeros)
    return name
