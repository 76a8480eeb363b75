"""Calls of our own kernels for processors in a lowered graph: engines/native has their C."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import onnx
from onnx import helper

from edgevlm.engines.lowering.graph import CONTRIB, attribute
from edgevlm.engines.native.library import DOMAIN

ATTENTION, ROUND, ACTIVATE = "RoundedAttention", "RoundRows", "ActivateAndRound"
NORM, SCALE, ONTO = "NormAndRound", "ScaleRows", "ScaleRowsOnto"
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
    declare(model, changed)
    return changed


def call_rows(model: onnx.ModelProto) -> int:
    """Have our kernels round rows and scale those of products; how many calls it has of them.

    A norm or an activation before the rounding goes into the same call, with an activation the
    steps of the product before and its bias too; what is added to scaled rows goes into theirs.
    """
    graph = _Graph(model)
    made = {node.name: call for node in model.graph.node if (call := graph.rounding(node))}
    made |= dict(found for node in model.graph.node if (found := graph.scaling(node)))
    if not made:
        return 0
    nodes = [made.get(node.name, node) for node in model.graph.node if node.name not in graph.gone]
    read = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)
    declare(model, len(made))
    return len(made)


def declare(model: onnx.ModelProto, calls: int) -> None:
    """Say that a graph has calls of our kernels, if it has any."""
    if calls and all(opset.domain != DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def finds_steps(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> list[str]:
    """The names of nodes that find the steps of rows for a QuantizeLinear; none for another op."""
    if node.op_type != "QuantizeLinear" or len(node.input) != 3:
        return []
    maker = makers.get(node.input[1])
    if maker is None or maker.name != f"{node.name}/step":
        return []
    return [f"{node.name}/{part}" for part in _FINDS_STEPS]


class _Graph:
    """Who makes and who reads which tensor. gone: names of nodes that a call of ours replaces."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.gone: set[str] = set()
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._vectors = {t.name for t in model.graph.initializer if len(t.dims) == 1}
        self._users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self._users[name].append(node)
        for value in model.graph.output:
            self._users[value.name].append(onnx.NodeProto(name="an output"))

    def rounding(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The call in place of a QuantizeLinear that rounds rows, and of what finds their steps."""
        parts = finds_steps(node, self._makers)
        if not parts:
            return None
        x, step, _ = node.input
        self.gone |= set(parts)
        maker = self._makers.get(x)
        alone = all(user.name in {node.name, *parts} for user in self._users[x])
        found = self._joined(maker) if maker is not None and alone else None
        op, inputs, attributes = found or (ROUND, [x], {})
        outputs = [node.output[0], step]
        return helper.make_node(op, inputs, outputs, node.name, domain=DOMAIN, **attributes)

    def _joined(self, maker: onnx.NodeProto) -> tuple[str, list[str], dict[str, Any]] | None:
        """The call for rounded rows and the op that makes them; None for one that stays."""
        attributes = _activation(maker)
        if attributes is not None:
            scaled = self._biased(maker.input[0])
            if scaled is None or len(self._users[maker.input[0]]) > 1:
                return None
            self.gone |= {maker.name, *(node.name for node in scaled)}
            return ACTIVATE, self._of(*scaled), attributes
        if maker.op_type != "LayerNormalization" or len(maker.input) != 3:
            return None
        if not self._vectors.issuperset(maker.input[1:]) or attribute(maker, "axis") != -1:
            return None
        self.gone.add(maker.name)
        return NORM, list(maker.input), {"epsilon": float(attribute(maker, "epsilon"))}

    def scaling(self, node: onnx.NodeProto) -> tuple[str, onnx.NodeProto] | None:
        """The name of the last node of a product's scaling, and the call in place of them all."""
        scaled = self._biased(node.output[0]) if node.op_type == "Add" else None
        if scaled is None or node.name in self.gone or scaled[1].name != node.name:
            return None
        users, last, inputs = self._users[node.output[0]], node, self._of(*scaled)
        self.gone.add(scaled[0].name)
        if len(users) == 1 and (users[0].domain, users[0].op_type) == ("", "Add"):
            (other,) = [name for name in users[0].input if name != node.output[0]] or [""]
            if other and other in self._makers and not self._is_vector(other):
                last, inputs = users[0], [*inputs, other]
                self.gone.add(node.name)
        op = SCALE if len(inputs) == 3 else ONTO
        return last.name, helper.make_node(op, inputs, last.output, last.name, domain=DOMAIN)

    def _biased(self, tensor: str) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
        """A product's Mul by the steps of its rows and the Add of its bias behind it, which makes
        the tensor, each for nobody else but for the last.
        """
        bias = self._makers.get(tensor)
        if bias is None or bias.op_type != "Add" or not self._is_vector(bias.input[1]):
            return None
        scaled = self._makers.get(bias.input[0])
        if scaled is None or scaled.op_type != "Mul" or len(self._users[bias.input[0]]) > 1:
            return None
        product = self._makers.get(scaled.input[0])
        of_integers = product is not None and product.op_type == "MatMulIntegerToFloat"
        return (scaled, bias) if of_integers else None

    def _is_vector(self, name: str) -> bool:
        """Whether it is stored, or the product of two that are."""
        maker = self._makers.get(name)
        if maker is None:
            return name in self._vectors
        return maker.op_type == "Mul" and self._vectors.issuperset(maker.input)

    @staticmethod
    def _of(scaled: onnx.NodeProto, bias: onnx.NodeProto) -> list[str]:
        """Product, steps of its rows, and bias."""
        return [*scaled.input, bias.input[1]]


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
