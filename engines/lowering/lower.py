"""Lowering: a portable graph becomes a target's graph by reading its table of rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx
import onnx.inliner
from onnx import TensorProto

from edgevlm.engines.lowering.capabilities import Action, Row, reads_opset_23_only, rows
from edgevlm.engines.lowering.graph import Rewriter, op_name
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.target import Target

_LOW_PRECISION = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Decision:
    """What happened to one kind of op in one component."""

    component: str
    op: str
    count: int
    action: Action
    into: str
    why: str


def decide(component: str, model: onnx.ModelProto, target: Target) -> list[Decision]:
    """One decision per kind of op and row, most frequent first.

    Raises UnsupportedError naming every op for which the target has no row.
    """
    chosen = [(op_name(node), _row(node, target)) for node in model.graph.node]
    missing = sorted({op for op, row in chosen if row is None})
    if missing:
        raise UnsupportedError(
            f"{component} uses ops that {target} has no lowering for: {', '.join(missing)}",
            hint="build for another target (edgevlm doctor lists those of this machine)",
        )
    counts = Counter((op, row) for op, row in chosen if row is not None)
    return [
        Decision(component, op, n, row.action, row.into, row.why)
        for (op, row), n in counts.most_common()
    ]


def _row(node: onnx.NodeProto, target: Target) -> Row | None:
    row = rows(target).get(op_name(node))
    if row is None or (row.since and target.version < row.since):
        return None
    return row.choose(node)


def lower(model: onnx.ModelProto, target: Target) -> onnx.ModelProto:
    """The graph for `target`. Call `decide` first: it refuses what has no row."""
    rewriter = Rewriter(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        row = _row(node, target)
        nodes += row.rewrite(node, rewriter) if row and row.rewrite else [node]
    rewriter.finish(nodes)
    lowered = onnx.inliner.inline_local_functions(model) if model.functions else model
    if reads_opset_23_only(target):
        # What is allowed there has in opset 24 more types and options, none of which is used.
        for opset in lowered.opset_import:
            opset.version = min(opset.version, 23)
    return lowered


def upcast(model: onnx.ModelProto) -> bool:
    """Make a half-precision graph float32, for processors without half kernels.

    Returns whether anything changed; then the weights files must be upcast too, and the caller
    must set the external tensors' offsets anew.
    """
    graph = model.graph
    found = False
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type in _LOW_PRECISION:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            found = True
    for tensor in graph.initializer:
        found |= _upcast_tensor(tensor)
    for node in graph.node:
        for attr in node.attribute:
            if node.op_type == "Cast" and attr.name == "to" and attr.i in _LOW_PRECISION:
                attr.i = TensorProto.FLOAT
    return found


def _upcast_tensor(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type not in _LOW_PRECISION:
        return False
    if tensor.data_location != TensorProto.EXTERNAL:
        values = onnx.numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    tensor.data_type = TensorProto.FLOAT
    return True


def check_allowed(component: str, model: onnx.ModelProto, target: Target) -> None:
    """Raise UnsupportedError if a lowered graph still holds an op that the target lacks."""
    every = [(op, row) for op, first in rows(target).items() for row in first.alternatives()]
    allowed = {op for op, row in every if row.action == "keep"}
    allowed |= {row.into for _, row in every if row.into}
    left = sorted({op_name(n) for n in model.graph.node} - allowed)
    if left:
        raise UnsupportedError(f"{component}: {', '.join(left)} remained after lowering")
