"""Calls of our own kernels for processors in a lowered graph: engines/native has their C."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import onnx
from onnx import helper

from edgevlm.engines.lowering.graph import CONTRIB, attribute
from edgevlm.engines.native.library import DOMAIN

ATTENTION, ROUND, ACTIVATE = "RoundedAttention", "RoundRows", "ActivateAndRound"
_INPUTS = 3  # of attention: q, k, v; no bias, mask or past
_FINDS_STEPS = "high low minus span rows step shape zeros".split()  # as rewrites.row_quantize names
_GELU, _GELU_TANH, _QUICK_GELU = 1, 2, 3  # of rows.h


def call_attention(model: onnx.ModelProto) -> int:
    """Have our kernel compute the plain attentions of a lowered graph; how many it has."""
    changed = 0
    for node in model.graph.node:
        plain = (node.domain, node.op_type) == (CONTRIB, "MultiHeadAttention")
        if plain and len(node.input) == _INPUTS:
            node.domain, node.op_type = DOMAIN, ATTENTION
            changed += 1
    _declare(model, changed)
    return changed


def call_rows(model: onnx.ModelProto) -> int:
    """Have our kernels round rows, and with them compute the activations before; how many calls.

    The steps of the product before an activation, and its bias, are applied on the way.
    """
    graph = _Graph(model)
    made = {node.name: call for node in model.graph.node if (call := graph.rounding(node))}
    if not made:
        return 0
    nodes = [made.get(node.name, node) for node in model.graph.node if node.name not in graph.gone]
    read = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)
    _declare(model, len(made))
    return len(made)


def _declare(model: onnx.ModelProto, calls: int) -> None:
    if calls and all(opset.domain != DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


class _Graph:
    """Who makes and who reads which tensor. gone: names of nodes that a call of ours replaces."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.gone: set[str] = set()
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._stored = {tensor.name for tensor in model.graph.initializer}
        self._users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self._users[name].append(node)
        for value in model.graph.output:
            self._users[value.name].append(onnx.NodeProto(name="an output"))

    def rounding(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The call in place of a QuantizeLinear that rounds rows, and of what finds their steps."""
        if node.op_type != "QuantizeLinear" or len(node.input) != 3:
            return None
        x, step, _ = node.input
        parts = [f"{node.name}/{part}" for part in _FINDS_STEPS]
        if step not in self._makers or self._makers[step].name != f"{node.name}/step":
            return None
        self.gone |= set(parts)
        inputs, attributes = self._activated(x, {node.name, *parts}) or ([x], {})
        op = ACTIVATE if attributes else ROUND
        outputs = [node.output[0], step]
        return helper.make_node(op, inputs, outputs, node.name, domain=DOMAIN, **attributes)

    def _activated(self, x: str, readers: set[str]) -> tuple[list[str], dict[str, Any]] | None:
        """Product, steps of its rows and bias, if x, for `readers` alone, is made of them."""
        activation = self._makers.get(x)
        if activation is None or any(user.name not in readers for user in self._users[x]):
            return None
        attributes = _activation(activation)
        bias = self._only(activation.input[0], "Add") if attributes else None
        scaled = self._only(bias.input[0], "Mul") if bias is not None else None
        if attributes is None or bias is None or scaled is None:
            return None
        product = self._makers.get(scaled.input[0])
        of_integers = product is not None and product.op_type == "MatMulIntegerToFloat"
        if not of_integers or bias.input[1] not in self._stored:
            return None
        self.gone |= {activation.name, bias.name, scaled.name}
        return [*scaled.input, bias.input[1]], attributes

    def _only(self, tensor: str, op: str) -> onnx.NodeProto | None:
        """What makes a tensor, if it is such an op and has one user."""
        maker = self._makers.get(tensor)
        alone = len(self._users[tensor]) == 1
        return maker if maker is not None and maker.op_type == op and alone else None


def _activation(node: onnx.NodeProto) -> dict[str, Any] | None:
    """The attributes of our kernel for an activation, None for another op."""
    if (node.domain, node.op_type) == (CONTRIB, "QuickGelu"):
        return {"activation": _QUICK_GELU, "alpha": float(attribute(node, "alpha"))}
    if (node.domain, node.op_type) == ("", "Gelu"):
        tanh = any(a.name == "approximate" and a.s == b"tanh" for a in node.attribute)
        return {"activation": _GELU_TANH if tanh else _GELU, "alpha": 0.0}
    return None


def lone_attention(width: int, heads: int) -> onnx.ModelProto:
    """A graph of one lowered attention, of q, k, v [batch, S, width], to be timed."""
    names = ["q", "k", "v"]
    node = helper.make_node(
        "MultiHeadAttention", names, ["y"], "attend", domain=CONTRIB, num_heads=heads
    )
    ports = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, None, width])
        for name in (*names, "y")
    ]
    graph = helper.make_graph([node], "attention", ports[:-1], ports[-1:])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
