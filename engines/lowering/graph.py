"""Edits of a graph while it is lowered: new nodes, shared helpers, constants."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

CONTRIB = "com.microsoft"


def op_name(node: onnx.NodeProto) -> str:
    """The op with its domain in front, unless it is a standard one."""
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """The value of an attribute that must be there."""
    return helper.get_attribute_value(next(a for a in node.attribute if a.name == name))


class Rewriter:
    """New nodes for one graph. Helpers that several nodes share are made once, in front."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.shared: dict[str, onnx.NodeProto] = {}
        self._replaced: set[str] = set()
        self._constants: dict[str, onnx.TensorProto] = {}
        self._users: dict[str, list[onnx.NodeProto]] = defaultdict(list)

    def node(
        self,
        op: str,
        inputs: Iterable[str],
        outputs: Iterable[str],
        name: str = "",
        **attrs: Any,
    ) -> onnx.NodeProto:
        """A node; `op` may carry a domain in front."""
        domain, _, kind = op.rpartition(".")
        return helper.make_node(kind, list(inputs), list(outputs), name, domain=domain, **attrs)

    def once(self, op: str, inputs: Iterable[str], output: str, **attrs: Any) -> str:
        """A node whose output every user shares; returns the tensor's name."""
        self.shared.setdefault(output, self.node(op, inputs, [output], output, **attrs))
        return output

    def constant(self, name: str, value: np.ndarray[Any, Any]) -> str:
        """A small constant; returns the tensor's name."""
        self._constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def as_bytes(self, name: str, shape: tuple[int, ...]) -> str:
        """A second tensor with the bytes of a stored one, in another shape; returns its name."""
        alias = f"{name}.bytes"
        if alias not in self._constants:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(next(t for t in self.model.graph.initializer if t.name == name))
            tensor.name, tensor.data_type = alias, onnx.TensorProto.UINT8
            del tensor.dims[:]
            tensor.dims.extend(shape)
            self._constants[alias] = tensor
        return alias

    def users(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes of the original graph that read a tensor."""
        if not self._users:
            for node in self.model.graph.node:
                for name in node.input:
                    self._users[name].append(node)
        return self._users[tensor]

    def only_user(self, tensor: str, op: str) -> tuple[onnx.NodeProto, str] | None:
        """The node that alone reads a tensor, if it is such an op with a stored vector as its
        other input; and that vector.
        """
        users, outputs = self.users(tensor), {value.name for value in self.model.graph.output}
        if len(users) != 1 or users[0].op_type != op or tensor in outputs:
            return None
        (other,) = [name for name in users[0].input if name != tensor] or [""]
        vectors = {t.name for t in self.model.graph.initializer if len(t.dims) == 1}
        return (users[0], other) if other in vectors else None

    def replace(self, node: onnx.NodeProto) -> list[str]:
        """The outputs of a node of the original graph, which another one makes from now on."""
        self._replaced.add(node.name)
        return list(node.output)

    def shape_of(self, weight: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        return tuple(next(t.dims for t in self.model.graph.initializer if t.name == weight))

    def finish(self, nodes: list[onnx.NodeProto]) -> None:
        """Put the new nodes into the model, drop what is unused, and sort the rest."""
        graph = self.model.graph
        graph.initializer.extend(self._constants.values())
        outputs = {value.name for value in graph.output}
        nodes = [node for node in nodes if node.name not in self._replaced]
        kept = _used([*self.shared.values(), *nodes], outputs)
        del graph.node[:]
        graph.node.extend(_ordered(kept, self._known()))
        inputs = {name for node in kept for name in node.input}
        unused = [t for t in graph.initializer if t.name not in inputs]
        for tensor in unused:
            graph.initializer.remove(tensor)
        called = {(node.domain, node.op_type) for node in kept}
        functions = [f for f in self.model.functions if (f.domain, f.name) in called]
        del self.model.functions[:]
        self.model.functions.extend(functions)
        self._declare_domains(kept)

    def _known(self) -> set[str]:
        graph = self.model.graph
        return {v.name for v in graph.input} | {t.name for t in graph.initializer} | {""}

    def _declare_domains(self, nodes: list[onnx.NodeProto]) -> None:
        domains = {node.domain for node in nodes} - {o.domain for o in self.model.opset_import}
        self.model.opset_import.extend(helper.make_opsetid(d, 1) for d in sorted(domains))


def cut(model: onnx.ModelProto, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Drop outputs of a graph, all that only they need, and `inputs`, which must be of that."""
    graph, dropped = model.graph, {*inputs, *outputs}
    for values in (graph.input, graph.output):
        kept = [value for value in values if value.name not in dropped]
        del values[:]
        values.extend(kept)
    nodes = _used(list(graph.node), {value.name for value in graph.output})
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    if read & dropped:
        raise AssertionError(f"{sorted(read & dropped)} are needed for other outputs")
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def _used(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """Nodes that contribute to `wanted`. Nodes may come in any order."""
    maker = {output: node for node in nodes for output in node.output if output}
    queue, kept = [n for n in wanted if n in maker], dict[int, onnx.NodeProto]()
    while queue:
        node = maker[queue.pop()]
        if id(node) not in kept:
            kept[id(node)] = node
            queue += [name for name in node.input if name in maker]
    return [node for node in nodes if id(node) in kept]


def _ordered(nodes: list[onnx.NodeProto], known: set[str]) -> list[onnx.NodeProto]:
    """Topological order that otherwise keeps the given one."""
    ready, waiting, result = set(known), list(nodes), list[onnx.NodeProto]()
    while waiting:
        postponed = []
        for node in waiting:
            if all(name in ready for name in node.input):
                result.append(node)
                ready.update(node.output)
            else:
                postponed.append(node)
        if len(postponed) == len(waiting):
            raise AssertionError(f"the graph has a cycle or a hole at {postponed[0].name}")
        waiting = postponed
    return result
