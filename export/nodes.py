"""How functions of our domain are put together: versions, nodes, references to attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import helper

DOMAIN = "edgevlm"
VERSION = 1
OPSET = 24
IR_VERSION = 11
ELEMENT = {
    "fp32": onnx.TensorProto.FLOAT,
    "fp16": onnx.TensorProto.FLOAT16,
    "bf16": onnx.TensorProto.BFLOAT16,
    "int64": onnx.TensorProto.INT64,
    "uint8": onnx.TensorProto.UINT8,
    "int8": onnx.TensorProto.INT8,
    "fp8": onnx.TensorProto.FLOAT8E4M3FN,
    "bool": onnx.TensorProto.BOOL,
}


def node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attrs: Any) -> onnx.NodeProto:
    """A node; an attribute given as "@name" refers to the function's own attribute."""
    values = {key: value for key, value in attrs.items() if not _refers(value)}
    node = helper.make_node(kind, list(inputs), list(outputs), **values)
    for key, value in attrs.items():
        if _refers(value):
            name, kind_of = value[1:].split(":")
            proto = onnx.AttributeProto(name=key, ref_attr_name=name)
            proto.type = onnx.AttributeProto.AttributeType.Value(kind_of)
            node.attribute.append(proto)
    return node


def _refers(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("@")


def ints(name: str, *values: int) -> onnx.NodeProto:
    """A constant vector of int64."""
    return helper.make_node("Constant", [], [name], value_ints=list(values))


def shape(name: str, *dims: int | str) -> list[onnx.NodeProto]:
    """An int64 vector for a Reshape: numbers, attributes of the function as "@name", and names of
    vectors of length 1.

    A body cannot put an integer attribute into a list, so it is joined from pieces; runtimes fold
    that into a constant.
    """
    nodes, pieces = [ints(f"{name}.axis", 0)], []
    for i, dim in enumerate(dims):
        piece = f"{name}.{i}"
        if isinstance(dim, int):
            nodes.append(ints(piece, dim))
        elif _refers(dim):
            nodes.append(node("Constant", [], [f"{piece}.scalar"], value_int=f"{dim}:INT"))
            nodes.append(node("Unsqueeze", [f"{piece}.scalar", f"{name}.axis"], [piece]))
        else:
            piece = dim
        pieces.append(piece)
    return [*nodes, node("Concat", pieces, [name], axis=0)]


def function(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    attributes: Sequence[str],
    nodes: Sequence[onnx.NodeProto],
) -> onnx.FunctionProto:
    """A function of our domain over the standard ops."""
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_function(
        DOMAIN, name, list(inputs), list(outputs), list(nodes), opset, list(attributes)
    )
