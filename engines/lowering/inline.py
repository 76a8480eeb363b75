"""Our functions' bodies in place of calls, every node and tensor named after the call.

`lm/layers.0/attention/attend` becomes `.../attend/q_rotated` and so on, so that a profile, a
builder's log and `--bisect` say where a node belongs. Constants become shared initializers, and
what only joins them (the shapes of Reshape nodes) is folded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgevlm.engines.lowering.graph import Rewriter

Array = np.ndarray[Any, Any]


def inlined(
    call: onnx.NodeProto, function: onnx.FunctionProto, r: Rewriter
) -> list[onnx.NodeProto]:
    """The nodes of a function's body for one call."""
    attributes = {a.name: a for a in [*function.attribute_proto, *call.attribute]}
    names = dict(zip(function.output, call.output, strict=True))
    names |= dict(zip(function.input, call.input, strict=False)) | {"": ""}
    known: dict[str, Array] = {}
    nodes = list[onnx.NodeProto]()
    for body in function.node:
        node = _bound(body, attributes)
        value = _folded(node, known)
        if value is not None:
            known[node.output[0]] = value
            continue
        for name in node.input:
            if name in known and name not in names:
                names[name] = _constant(known[name], r)
        for name in node.output:
            names.setdefault(name, f"{call.name}/{name}")
        label = f"{call.name}/{node.output[0]}"
        inputs, outputs = ([names[n] for n in part] for part in (node.input, node.output))
        renamed = helper.make_node(node.op_type, inputs, outputs, label, domain=node.domain)
        renamed.attribute.extend(node.attribute)
        nodes.append(renamed)
    return nodes


def _bound(body: onnx.NodeProto, attributes: Mapping[str, onnx.AttributeProto]) -> onnx.NodeProto:
    """A copy of a body's node with the call's attributes for those that it refers to."""
    node = onnx.NodeProto()
    node.CopyFrom(body)
    del node.attribute[:]
    for attribute in body.attribute:
        if not attribute.ref_attr_name:
            node.attribute.append(attribute)
        elif attribute.ref_attr_name in attributes:
            bound = onnx.AttributeProto()
            bound.CopyFrom(attributes[attribute.ref_attr_name])
            bound.name = attribute.name
            node.attribute.append(bound)
    return node


def _folded(node: onnx.NodeProto, known: Mapping[str, Array]) -> Array | None:
    """The value of a node that only joins constants, None for every other."""
    compute = _FOLDABLE.get(node.op_type)
    if compute is None or any(name not in known for name in node.input):
        return None
    return compute(node, [known[name] for name in node.input])


def _value(node: onnx.NodeProto, _: Sequence[Array]) -> Array:
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    floats = attribute.name.startswith("value_float")
    return np.asarray(value, np.float32 if floats else np.int64)


def _unsqueezed(node: onnx.NodeProto, inputs: Sequence[Array]) -> Array:
    x, axes = inputs
    return np.expand_dims(x, tuple(axes.tolist()))


def _joined(node: onnx.NodeProto, inputs: Sequence[Array]) -> Array:
    return np.concatenate(inputs, node.attribute[0].i)


_FOLDABLE: Mapping[str, Callable[[onnx.NodeProto, Sequence[Array]], Array]] = {
    "Constant": _value,
    "Unsqueeze": _unsqueezed,
    "Concat": _joined,
}


def _constant(value: Array, r: Rewriter) -> str:
    """A shared initializer, named by what it holds."""
    kind = {"int64": "ints" if value.ndim else "int"}.get(value.dtype.name, value.dtype.name)
    text = "_".join(str(v) for v in value.reshape(-1).tolist())
    return r.constant(f"{kind}.{text}", value)
