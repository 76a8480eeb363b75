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


def node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attrs: Any) -> onnx.NodeProto:
    """A node; an attribute given as "@name" refers to the function's own attribute."""
    own = {key: value for key, value in attrs.items() if not _refers(value)}
    node = helper.make_node(kind, list(inputs), list(outputs), **own)
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
