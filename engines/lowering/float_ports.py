"""A half-precision graph whose callers give and get float32; only its states keep their format."""

from __future__ import annotations

from collections.abc import Set

import onnx
from onnx import TensorProto, helper

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def widen(model: onnx.ModelProto, states: Set[str]) -> None:
    """Put a Cast behind every float input and before every float output but `states`.

    NumPy has no bf16, and a component's outputs are another's inputs: float32 is what all share.
    """
    graph = model.graph
    inputs = [v for v in graph.input if _half(v) and v.name not in states]
    outputs = [v for v in graph.output if _half(v) and v.name not in states]
    narrow = {v.name: f"{v.name}/narrow" for v in (*inputs, *outputs)}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [narrow.get(name, name) for name in names]
    before = [_cast(v.name, narrow[v.name], v.type.tensor_type.elem_type) for v in inputs]
    after = [_cast(narrow[v.name], v.name, TensorProto.FLOAT) for v in outputs]
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*inputs, *outputs):
        value.type.tensor_type.elem_type = TensorProto.FLOAT


def _half(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type in _HALF


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"{source}/cast", to=kind)
