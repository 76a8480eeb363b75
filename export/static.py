"""Recording static INT8 and FP8: Q/DQ around the input, and a weight in codes behind
DequantizeLinear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import onnx
from onnx import helper

from edgevlm.export.nodes import ELEMENT
from edgevlm.toolkit.checkpoints.safetensors_io import Blocks, TensorSpec, row_blocks
from edgevlm.toolkit.ops.vocabulary import Array, EightBits
from edgevlm.toolkit.quantization import static
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.quantization.static import INPUT, SCALE, Form


class Emitter(Protocol):
    """What is needed of a recorder."""

    small: dict[str, onnx.TensorProto]

    def one(self, kind: str, inputs: Sequence[str], name: str = "", **attrs: Any) -> str: ...


class StaticWeights:
    """The weights of one component that its graph takes in codes, with their forms, and the steps
    of their inputs.

    Every layer has Q/DQ of its own around its input, also where several read one: TensorRT joins
    what is the same, and ONNX Runtime makes integer products only where nothing else reads the
    codes.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], plan: PrecisionPlan) -> None:
        self._shapes = shapes
        self._plan = plan
        self.steps: dict[str, tuple[Array, Form]] = {}

    def operands(self, e: Emitter, x: str, weight: str, path: str) -> tuple[str, str]:
        """x and `weight` as the product at `path` takes them: as they are, or both behind Q/DQ.

        Raises CalibrationError if the plan has no range for the layer.
        """
        form = static.form_at(self._plan, path)
        if form is None or weight not in self._shapes:
            return x, weight
        name, shape = weight + form.suffix, self._shapes[weight]
        self.steps[weight] = static.input_step(self._plan.ranges, path, form), form
        step = [name + INPUT, zeros(e, form.to, ())]
        codes = e.one("QuantizeLinear", [x, *step], f"{path}/input/quantize")
        rounded = e.one("DequantizeLinear", [codes, *step], f"{path}/input/dequantize")
        own = weight if form is static.INT8 else ""
        stored = [name, name + SCALE, zeros(e, form.to, static.scale_shape(shape, form), own)]
        along = {"axis": static.channel_axis(shape)} if form.by_channel else {}
        w = e.one("DequantizeLinear", stored, f"{path}/weight/dequantize", **along)
        return rounded, w

    def planned(self, weight: str, dtype: str) -> list[TensorSpec]:
        """The three tensors of a weight in the weights file; none of a weight stored otherwise."""
        if weight not in self.steps:
            return []
        form, shape = self.steps[weight][1], self._shapes[weight]
        name = weight + form.suffix
        return [
            TensorSpec(name, form.to, shape),
            TensorSpec(name + SCALE, dtype, static.scale_shape(shape, form)),
            TensorSpec(name + INPUT, dtype, ()),
        ]

    def content(self, tensor: str, weights: Mapping[str, Array]) -> Blocks | None:
        """What one of those tensors holds; None for any other tensor."""
        parts = static.split(tensor)
        if parts is None or parts[0] not in self.steps:
            return None
        weight, form, tail = parts
        if tail == INPUT:
            return row_blocks(self.steps[weight][0])
        matrix = weights[weight]
        steps = static.scales(matrix, form)
        return row_blocks(steps) if tail == SCALE else static.codes(matrix, steps, form)


def zeros(e: Emitter, to: EightBits, shape: tuple[int, ...], weight: str = "") -> str:
    """Zero points of such a shape, shared unless they are of this weight.

    On x86 without VNNI, ONNX Runtime makes INT8 weights unsigned, each with its zero points, and
    refuses zero points that it makes so twice.
    """
    name = static.zero_name(to, shape) + (f".{weight}" if weight else "")
    content = bytes(math.prod(shape))
    tensor = helper.make_tensor(name, ELEMENT[to], list(shape), content, raw=True)
    e.small.setdefault(name, tensor)
    return name
