"""Edits of a graph while it is lowered: new nodes, shared helpers, constants."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CONTRIB = "com.microsoft"
_FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
}


def op_name(node: onnx.NodeProto) -> str:
    """The op with its domain in front, unless it is a standard one."""
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """The value of an attribute that must be there."""
    return helper.get_attribute_value(next(a for a in node.attribute if a.name == name))


def float_type(model: onnx.ModelProto) -> int:
    """TensorProto's number of the floats that a component takes, which its weights share."""
    kinds = (value.type.tensor_type.elem_type for value in model.graph.input)
    return next((kind for kind in kinds if kind in _FLOATS), TensorProto.FLOAT)


def float_format(model: onnx.ModelProto) -> str:
    """The same by its name: fp32, fp16 or bf16."""
    return _FLOATS[float_type(model)]


class Rewriter:
    """New nodes for one graph. Helpers that several nodes share are made once, in front."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.float_type = model, float_type(model)
        self.shared: dict[str, onnx.NodeProto] = {}
        self._replaced: set[str] = set()
        self._constants: dict[str, onnx.TensorProto] = {}
        self._users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self._stored = {tensor.name for tensor in model.graph.initializer}

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
        """A small constant, unless the graph has it; returns the tensor's name."""
        if name not in self._stored and name not in self._constants:
            self._constants[name] = numpy_helper.from_array(value, name)
        return name

    def as_bytes(self, name: str, shape: tuple[int, ...]) -> str:
        """A second tensor with the bytes of a stored one, in another shape; returns its name."""
        return self.again(name, f"{name}.bytes", shape, TensorProto.UINT8)

    def again(self, name: str, alias: str, shape: tuple[int, ...], kind: int = 0) -> str:
        """A second tensor `alias` of what is stored as `name`, in another shape; returns its name.

        kind: its type, that of the stored one by default.
        """
        if alias not in self._constants:
            tensor = TensorProto()
            tensor.CopyFrom(self.tensor(name))
            tensor.name, tensor.data_type = alias, kind or tensor.data_type
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

    def maker(self, tensor: str) -> onnx.NodeProto:
        """The node of the original graph that makes a tensor."""
        found: onnx.NodeProto = next(n for n in self.model.graph.node if tensor in n.output)
        return found

    def is_stored(self, tensor: str) -> bool:
        """Whether a tensor is a weight or a constant."""
        return tensor in self._stored

    def tensor(self, name: str) -> onnx.TensorProto:
        """A stored tensor."""
        found: onnx.TensorProto = next(t for t in self.model.graph.initializer if t.name == name)
        return found

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
        return tuple(self.tensor(weight).dims)

    def function(self, node: onnx.NodeProto) -> onnx.FunctionProto | None:
        """The function that a node calls, None for a standard op."""
        known = ((f.domain, f.name, f) for f in self.model.functions)
        called = (node.domain, node.op_type)
        return next((f for domain, name, f in known if (domain, name) == called), None)

    def finish(self, nodes: list[onnx.NodeProto]) -> None:
        """Put the new nodes into the model, drop what is unused, and sort the rest."""
        graph = self.model.graph
        graph.initializer.extend(self._constants.values())
        outputs = {value.name for value in graph.output}
        nodes = [node for node in nodes if node.name not in self._replaced]
        kept = used([*self.shared.values(), *nodes], outputs)
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
        used = {node.domain for node in nodes} | {""}
        known = [opset for opset in self.model.opset_import if opset.domain in used]
        new = sorted(used - {opset.domain for opset in known})
        del self.model.opset_import[:]
        self.model.opset_import.extend([*known, *(helper.make_opsetid(d, 1) for d in new)])


class Body:
    """The nodes that replace one call, named after it, in the order in which they are made."""

    def __init__(self, name: str, rewriter: Rewriter) -> None:
        self.name, self.rewriter = name, rewriter
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, op: str, inputs: Iterable[str], label: str, **attrs: Any) -> str:
        """A node; the name of its output."""
        return self.several(op, inputs, label, 1, **attrs)[0]

    def several(
        self, op: str, inputs: Iterable[str], label: str, count: int, **attrs: Any
    ) -> list[str]:
        """A node with `count` outputs; their names."""
        name = f"{self.name}/{label}"
        names = [name] if count == 1 else [f"{name}.{i}" for i in range(count)]
        self.nodes.append(self.rewriter.node(op, inputs, names, name, **attrs))
        return names

    def ending(
        self, op: str, inputs: Iterable[str], outputs: Iterable[str], **attrs: Any
    ) -> list[onnx.NodeProto]:
        """All nodes, the last of which has the call's name and outputs."""
        return [*self.nodes, self.rewriter.node(op, inputs, outputs, self.name, **attrs)]

    def ints(self, *values: int) -> str:
        """A shared vector of int64."""
        name = "ints." + "_".join(map(str, values))
        return self.rewriter.constant(name, np.asarray(values, np.int64))

    def float32(self, value: float) -> str:
        """A shared float32 number."""
        return self.rewriter.constant(f"float32.{value}", np.asarray(value, np.float32))

    def heads(self, x: str, count: int, label: str) -> str:
        """[B, S, heads * d] as [B, heads, S, d]."""
        apart = self("Reshape", [x, self.ints(0, 0, count, -1)], f"{label}_bshd", allowzero=0)
        return self("Transpose", [apart], f"{label}_bhsd", perm=[0, 2, 1, 3])

    def joined(self, x: str, outputs: Iterable[str]) -> list[onnx.NodeProto]:
        """[B, heads, S, d] as [B, S, heads * d], the call's output; all nodes."""
        apart = self("Transpose", [x], f"{x.rpartition('/')[2]}_bshd", perm=[0, 2, 1, 3])
        return self.ending("Reshape", [apart, self.ints(0, 0, -1)], outputs, allowzero=0)


def cut(model: onnx.ModelProto, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Drop outputs of a graph, all that only they need, and `inputs`, which must be of that."""
    graph, dropped = model.graph, {*inputs, *outputs}
    for values in (graph.input, graph.output):
        kept = [value for value in values if value.name not in dropped]
        del values[:]
        values.extend(kept)
    nodes = used(list(graph.node), {value.name for value in graph.output})
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    if read & dropped:
        raise AssertionError(f"{sorted(read & dropped)} are needed for other outputs")
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def used(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that contribute to `wanted`. Nodes may come in any order."""
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
