"""Lowering: a portable graph becomes a target's graph by reading its table of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx.inliner
from onnx import TensorProto

from edgevlm.engines.lowering import capabilities
from edgevlm.engines.lowering.capabilities import Decision, Row
from edgevlm.engines.lowering.graph import Rewriter, op_name
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.target import Target

_LOW_PRECISION = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Lowered:
    """A target's graph, and the decisions that led to it."""

    model: onnx.ModelProto
    decisions: tuple[Decision, ...]


def decide(component: str, model: onnx.ModelProto, target: Target) -> list[Decision]:
    """One decision per kind of op and row, most frequent first.

    Raises UnsupportedError naming every op for which the target has no row.
    """
    return _decisions(component, model, _chosen(component, model, target, rows_of(target)))


def lower(model: onnx.ModelProto, target: Target) -> onnx.ModelProto:
    """The graph for `target` alone, of a model that is no component of a bundle."""
    return lower_component(model.graph.name or "the graph", model, target).model


def lower_component(component: str, model: onnx.ModelProto, target: Target) -> Lowered:
    """The graph for `target`, made of `model` itself, in one pass over its nodes.

    Raises UnsupportedError naming every op for which the target has no row.
    """
    rows = rows_of(target)
    chosen = _chosen(component, model, target, rows)
    decisions = _decisions(component, model, chosen)
    rewriter, nodes = Rewriter(model), list[onnx.NodeProto]()
    for node, row in zip(model.graph.node, chosen, strict=True):
        nodes += row.rewrite(node, rewriter) if row.rewrite else [node]
    rewriter.finish(nodes)
    lowered = onnx.inliner.inline_local_functions(model) if model.functions else model
    for opset in lowered.opset_import:
        if not opset.domain:
            # In newer opsets the target's ops only have more types and options; none is used.
            opset.version = min(opset.version, capabilities.of(target).opset)
    check_allowed(component, lowered, target)
    return Lowered(lowered, tuple(decisions))


def rows_of(target: Target) -> Mapping[str, Row]:
    """The table of a target in its release."""
    return capabilities.of(target).rows()


def _chosen(
    component: str, model: onnx.ModelProto, target: Target, rows: Mapping[str, Row]
) -> list[Row]:
    """The row of every node."""
    chosen, missing = list[Row](), set[str]()
    for node in model.graph.node:
        first = rows.get(op_name(node))
        row = first.choose(node) if first else None
        if row is None:
            missing.add(op_name(node))
        else:
            chosen.append(row)
    if missing:
        raise UnsupportedError(
            f"{component} uses ops that {target} has no lowering for: {', '.join(sorted(missing))}",
            hint="build for another target (edgevlm doctor lists those of this machine)",
        )
    return chosen


def _decisions(component: str, model: onnx.ModelProto, chosen: list[Row]) -> list[Decision]:
    names = map(op_name, model.graph.node)
    counts = Counter(zip(names, chosen, strict=True))
    return [
        Decision(component, op, n, row.action, row.into, row.why)
        for (op, row), n in counts.most_common()
    ]


def upcast(model: onnx.ModelProto) -> bool:
    """Make a half-precision graph float32, for processors without half kernels.

    Returns whether anything changed; then the weights files must be upcast too, and the caller
    must set the external tensors' offsets anew.
    """
    graph = model.graph
    changed = False
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type in _LOW_PRECISION:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            changed = True
    for tensor in graph.initializer:
        changed |= _upcast_tensor(tensor)
    for node in graph.node:
        for attr in node.attribute:
            if node.op_type == "Cast" and attr.name == "to" and attr.i in _LOW_PRECISION:
                attr.i = TensorProto.FLOAT
    return changed


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
    rows = [(op, row) for op, first in rows_of(target).items() for row in first.alternatives()]
    allowed = {op for op, row in rows if row.action == "keep"}
    allowed |= {row.into for _, row in rows if row.into}
    unsupported = sorted({op_name(n) for n in model.graph.node} - allowed)
    if unsupported:
        raise UnsupportedError(f"{component}: {', '.join(unsupported)} remained after lowering")
