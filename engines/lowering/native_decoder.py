"""Calls of our own kernels in a lowered language model: its norms, gates, sums and attention.

What is left of its rows (those of attention, which nothing else makes) is for call_rows of
native.py, which goes over the graph afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgevlm.engines.lowering.graph import CONTRIB, attribute, used
from edgevlm.engines.lowering.native import ONTO, SCALE, declare, finds_steps
from edgevlm.engines.native.library import DOMAIN

CACHED = "CachedAttention"
NORM, SUM, GATE = "RmsNormAndRound", "AddNormAndRound", "GateAndRound"
_INPUTS = 9  # of GroupQueryAttention that rotates: q, k, v, both caches, two sizes, both tables
_MULTIPLE = 16  # of channels of a head that the kernel takes


def call_cached_attention(model: onnx.ModelProto) -> int:
    """Have our kernel compute the cached attentions of a lowered graph; how many it has."""
    changed = 0
    for node in model.graph.node:
        if not _is_plain(node):
            continue
        heads = {name: attribute(node, name) for name in ("num_heads", "kv_num_heads", "scale")}
        total = 6  # the kernel asks `lengths` alone
        inputs = [name for i, name in enumerate(node.input) if i != total]
        node.CopyFrom(
            helper.make_node(CACHED, inputs, node.output, node.name, domain=DOMAIN, **heads)
        )
        changed += 1
    _finish(model, list(model.graph.node), changed)
    return changed


def _is_plain(node: onnx.NodeProto) -> bool:
    """Whether it rotates whole heads as halves, and sees all positions before."""
    if (node.domain, node.op_type) != (CONTRIB, "GroupQueryAttention"):
        return False
    wanted = {"do_rotary": 1, "rotary_interleaved": 0, "local_window_size": -1}
    found = {name: attribute(node, name) for name in wanted}
    return len(node.input) == _INPUTS and found == wanted


def fits(head_dim: int) -> bool:
    """Whether heads have a number of channels that the kernel takes."""
    return head_dim % _MULTIPLE == 0


def call_decoder_rows(model: onnx.ModelProto) -> int:
    """Have our kernels norm, gate and add rows, and round them in the same pass; how many calls."""
    graph = _Graph(model)
    for node in model.graph.node:
        graph.round(node)
    for node in model.graph.node:
        graph.scale(node)
    nodes = [
        graph.made.get(node.name, node)
        for node in model.graph.node
        if node.name in graph.made or node.name not in graph.gone
    ]
    model.graph.initializer.extend(graph.zeros.values())
    _finish(model, nodes, len(graph.made))
    return len(graph.made)


def _finish(model: onnx.ModelProto, nodes: list[onnx.NodeProto], calls: int) -> None:
    """The graph with these nodes, and without what nothing reads any more."""
    if not calls:
        return
    kept = used(nodes, {value.name for value in model.graph.output})
    read = {name for node in kept for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(tensors)
    declare(model, calls)


class _Graph:
    """made: calls of ours by the node that they stand in the place of. gone: names of nodes that
    calls replace. zeros: biases of products without one.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.made: dict[str, onnx.NodeProto] = {}
        self.gone: set[str] = set()
        self.zeros: dict[str, onnx.TensorProto] = {}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._stored = {t.name: tuple(t.dims) for t in model.graph.initializer}
        self._users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self._users[name].append(node)
        for value in model.graph.output:
            self._users[value.name].append(onnx.NodeProto(name="an output"))

    def round(self, node: onnx.NodeProto) -> None:
        """A call in place of a QuantizeLinear that rounds rows, and of what makes them."""
        steps = finds_steps(node, self._makers)
        maker = self._makers.get(node.input[0]) if steps else None
        others = {user.name for user in self._users[node.input[0]]} - {node.name, *steps}
        if maker is None or others:
            return
        outputs = [node.output[0], node.input[1]]
        if maker.op_type == "RMSNormalization" and attribute(maker, "axis") == -1:
            self.gone |= {node.name, maker.name, *steps}
            self._norm(node.name, maker, outputs)
        elif (gated := self._gated(maker)) is not None:
            inputs, names = gated
            self.gone |= {node.name, *names, *steps}
            self._make(node.name, GATE, inputs, outputs)

    def _norm(self, name: str, norm: onnx.NodeProto, outputs: list[str]) -> None:
        x, weight = norm.input
        epsilon = float(attribute(norm, "epsilon"))
        add = self._makers.get(x)
        summed = self._sum(add) if add is not None else None
        if add is None or summed is None:
            self._make(name, NORM, [x, weight], outputs, epsilon=epsilon)
            return
        scaled, other = summed
        self.gone |= {add.name, scaled.name}
        # at the place of the sum, which others read as well
        self._make(add.name, SUM, [*scaled.input, other, weight], [x, *outputs], epsilon=epsilon)

    def _sum(self, add: onnx.NodeProto) -> tuple[onnx.NodeProto, str] | None:
        """The scaling of a product, and what is added to it."""
        if (add.domain, add.op_type) != ("", "Add"):
            return None
        for name, other in (add.input, reversed(add.input)):
            scaled = self._scaled(name)
            if scaled is not None and other in self._makers and other != name:
                return scaled, other
        return None

    def _gated(self, maker: onnx.NodeProto) -> tuple[list[str], set[str]] | None:
        """Products of gate and up with the steps of their rows, and the nodes behind them."""
        active = self._makers.get(maker.input[0]) if maker.op_type == "Mul" else None
        if active is None or (active.domain, active.op_type) != (CONTRIB, "QuickGelu"):
            return None
        gate, up = self._scaled(active.input[0]), self._scaled(maker.input[1])
        alone = len(self._users[maker.input[0]]) == 1 and attribute(active, "alpha") == 1.0
        if gate is None or up is None or gate.input[1] != up.input[1] or not alone:
            return None
        inputs = [gate.input[0], up.input[0], gate.input[1]]
        return inputs, {maker.name, active.name, gate.name, up.name}

    def scale(self, node: onnx.NodeProto) -> None:
        """A call in place of the scaling of a product without bias, and of a sum behind it."""
        if node.name in self.gone:
            return
        summed = self._sum(node)
        if summed is not None:
            scaled, other = summed
            self.gone |= {scaled.name, node.name}
            inputs = [*scaled.input, self._no_bias(scaled), other]
            self._make(node.name, ONTO, inputs, list(node.output))
        elif self._is_scaling(node) and not self._has_bias(node):
            self.gone.add(node.name)
            self._make(node.name, SCALE, [*node.input, self._no_bias(node)], list(node.output))

    def _scaled(self, tensor: str) -> onnx.NodeProto | None:
        """A product's Mul by the steps of its rows, if it makes the tensor for one other alone."""
        node = self._makers.get(tensor)
        alone = node is not None and len(self._users[tensor]) == 1 and self._is_scaling(node)
        return node if alone else None

    def _is_scaling(self, node: onnx.NodeProto) -> bool:
        product = self._makers.get(node.input[0]) if node.op_type == "Mul" else None
        return product is not None and product.op_type == "MatMulIntegerToFloat"

    def _has_bias(self, scaled: onnx.NodeProto) -> bool:
        users = self._users[scaled.output[0]]
        return any(u.op_type == "Add" and not self._makers.keys() >= set(u.input) for u in users)

    def _no_bias(self, scaled: onnx.NodeProto) -> str:
        width = self._stored[self._makers[scaled.input[0]].input[1]][1]
        name = f"native.no_bias.{width}"
        zeros = np.zeros(width, np.float32)
        self.zeros.setdefault(name, numpy_helper.from_array(zeros, name))
        return name

    def _make(
        self, name: str, op: str, inputs: list[str], outputs: list[str], **attributes: Any
    ) -> None:
        self.made[name] = helper.make_node(op, inputs, outputs, name, domain=DOMAIN, **attributes)


def lone_attention(heads: int, kv_heads: int, size: int, scale: float) -> onnx.ModelProto:
    """A graph of one lowered cached attention, to be timed: q, k, v, key, value, last, total, cos,
    sin -> y, new_key, new_value.
    """
    floats = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size}
    cache, tables = [None, kv_heads, None, size], [None, size // 2]
    kind, whole = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    shapes: list[tuple[str, Any, Any]] = [
        *((name, kind, [None, None, width]) for name, width in floats.items()),
        *((name, kind, cache) for name in ("key", "value")),
        *(("last", whole, [None]), ("total", whole, [])),
        *((name, kind, tables) for name in ("cos", "sin")),
    ]
    outputs: list[tuple[str, Any, Any]] = [
        ("y", kind, [None, None, heads * size]),
        ("new_key", kind, cache),
    ]
    outputs.append(("new_value", kind, cache))
    node = helper.make_node(
        "GroupQueryAttention",
        [name for name, *_ in shapes],
        [name for name, *_ in outputs],
        "attend",
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=scale,
        do_rotary=1,
        rotary_interleaved=0,
        local_window_size=-1,
    )
    given, made = (
        [helper.make_tensor_value_info(*port) for port in ports] for ports in (shapes, outputs)
    )
    graph = helper.make_graph([node], "attention", given, made)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
