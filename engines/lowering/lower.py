"""Lowering: a portable graph becomes a target's graph by reading its table of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from edgevlm.engines.lowering import capabilities
from edgevlm.engines.lowering.capabilities import Decision, Row
from edgevlm.engines.lowering.graph import Rewriter, float_format, op_name
from edgevlm.engines.lowering.inline import inlined
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.target import Target

_LOW_PRECISION = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Lowered:
    """A target's graph, and the decisions that led to it."""

    model: onnx.ModelProto
    decisions: tuple[Decision, ...]


def decide(
    component: str, model: onnx.ModelProto, target: Target, plugins: Collection[str] = ()
) -> list[Decision]:
    """One decision per kind of op and row, most frequent first; `model` stays as it is.

    plugins: as of lower_component. Raises UnsupportedError naming every op for which the target has
    no row.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return list(lower_component(component, copy, target, plugins).decisions)


def lower(model: onnx.ModelProto, target: Target) -> onnx.ModelProto:
    """The graph for `target` alone, of a model that is no component of a bundle."""
    return lower_component(model.graph.name or "the graph", model, target).model


def lower_component(
    component: str, model: onnx.ModelProto, target: Target, plugins: Collection[str] = ()
) -> Lowered:
    """The graph for `target`, made of `model` itself.

    plugins: ops whose calls stay, for plugins that whoever builds has registered (MSDeformAttn).
    Raises UnsupportedError naming every op for which the target has no row, or no plugin.
    """
    rewriter = Rewriter(model)
    taken = _Taken(rows_of(target, plugins), float_format(model))
    nodes = taken.lowered(list(model.graph.node), rewriter)
    taken.check(component, target)
    rewriter.finish(nodes)
    bodies = [opset for function in model.functions for opset in function.opset_import]
    for opset in [*model.opset_import, *bodies]:
        if not opset.domain:
            # In newer opsets the target's ops only have more types and options; none is used.
            opset.version = min(opset.version, capabilities.of(target).opset)
    check_allowed(component, model, target, plugins)
    capabilities.of(target).lint(component, model)
    decisions = (
        Decision(component, op, n, row.action, row.into, row.why)
        for (op, row), n in taken.counts.most_common()
    )
    return Lowered(model, tuple(decisions))


class _Taken:
    """The rows that were taken for the nodes of one graph.

    counts: how often which row was taken for which op. A body's ops count where they are not kept.
    """

    def __init__(self, rows: Mapping[str, Row], dtype: str) -> None:
        self._rows, self._dtype = rows, dtype
        self.counts: Counter[tuple[str, Row]] = Counter()
        self._missing: set[str] = set()

    def check(self, component: str, target: Target) -> None:
        """Raise UnsupportedError naming the ops without a row, or with one that refuses them."""
        refused = [(op, row.why) for op, row in self.counts if row.action == "refuse"]
        if not self._missing and not refused:
            return
        message = f"{component} uses ops that {target} has no lowering for: "
        message += ", ".join(sorted(self._missing))
        if not self._missing:
            message = f"{component} cannot run on {target}: "
            message += "; ".join(f"{op}: {why}" for op, why in refused)
        raise UnsupportedError(
            message, hint="build for another target (edgevlm doctor lists those of this machine)"
        )

    def lowered(
        self, nodes: Sequence[onnx.NodeProto], r: Rewriter, *, body: bool = False
    ) -> list[onnx.NodeProto]:
        """What stands in place of `nodes`; body: whether they are of a function."""
        result = list[onnx.NodeProto]()
        for node in nodes:
            op = op_name(node)
            first = self._rows.get(op)
            row = first.choose(node, self._dtype) if first else None
            if row is None:
                self._missing.add(op)
                continue
            if not body or row.action != "keep":
                self.counts[op, row] += 1
            function = r.function(node) if row.action == "decompose" else None
            if row.rewrite:
                result += row.rewrite(node, r)
            elif function is not None:
                result += self.lowered(inlined(node, function, r), r, body=True)
            else:
                result.append(node)
        return result


def rows_of(target: Target, plugins: Collection[str] = ()) -> Mapping[str, Row]:
    """The table of a target in its release, with plugins for the ops that are named."""
    return capabilities.of(target).rows(plugins)


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


def check_allowed(
    component: str, model: onnx.ModelProto, target: Target, plugins: Collection[str] = ()
) -> None:
    """Raise UnsupportedError if a lowered graph still holds an op that the target lacks."""
    table = rows_of(target, plugins)
    rows = [(op, row) for op, first in table.items() for row in first.alternatives()]
    allowed = {op for op, row in rows if row.action == "keep"}
    allowed |= {row.into for _, row in rows if row.into}
    unsupported = sorted({op_name(n) for n in model.graph.node} - allowed)
    if unsupported:
        raise UnsupportedError(f"{component}: {', '.join(unsupported)} remained after lowering")
