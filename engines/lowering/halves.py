"""Weights in 16 bits below products in float32: stored as they are, upcast where they are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import onnx
from onnx import TensorProto, helper

from edgevlm.engines.lowering.graph import CONTRIB, attribute
from edgevlm.engines.native.library import DOMAIN

UPCAST = "UpcastMatMul"
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_SUM, _PRODUCT = 1, 2  # of halves.h's joined
_TURNED = 8  # bytes: whole numbers of every type
_TRANSPOSED = {"alpha": 1.0, "transA": 0, "transB": 1, "transBatchA": 0, "transBatchB": 0}


def candidates(model: onnx.ModelProto) -> list[str]:
    """The stored float32 matrices that products read as their second input, or Gather as its table,
    and nothing else does.
    """
    readers: dict[str, list[bool]] = defaultdict(list)
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            readers[name].append(_reads_halves(node, at))
    return [
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        and tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) == 2
        and readers[tensor.name]
        and all(readers[tensor.name])
    ]


def _reads_halves(node: onnx.NodeProto, at: int) -> bool:
    """Whether an input of a node may be in 16 bits, with a Cast somewhere behind it."""
    op = (node.domain, node.op_type)
    if op == ("", "Gather"):
        return at == 0 and attribute(node, "axis") == 0
    return at == 1 and (op == ("", "MatMul") or _transposed(node))


def _transposed(node: onnx.NodeProto) -> bool:
    """Whether it is a product by a transposed matrix, and nothing else."""
    if (node.domain, node.op_type) != (CONTRIB, "FusedMatMul"):
        return False
    return {a.name: helper.get_attribute_value(a) for a in node.attribute} == _TRANSPOSED


def narrow(model: onnx.ModelProto, formats: Mapping[str, str]) -> None:
    """Read these tensors in 16 bits: products of their upcast, of a table the rows' upcast alone.

    formats: fp16 or bf16 by the name of a candidate. Sizes and offsets are left to the caller.
    """
    for tensor in model.graph.initializer:
        if tensor.name in formats:
            tensor.data_type = TYPES[formats[tensor.name]]
    nodes, upcast = list[onnx.NodeProto](), set[str]()
    for node in model.graph.node:
        table = node.op_type == "Gather" and node.input[0] in formats
        weight = "" if table or len(node.input) < 2 else node.input[1]
        if weight in formats:
            node.input[1] = f"{weight}/upcast"
            if weight not in upcast:
                nodes.append(_cast(weight, node.input[1]))
            upcast.add(weight)
        nodes.append(node)
        if table:
            rows, node.output[0] = node.output[0], f"{node.name}/narrow"
            nodes.append(_cast(node.output[0], rows))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _cast(source: str, target: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"{source}/cast", to=TensorProto.FLOAT)


def call_upcast(model: onnx.ModelProto) -> int:
    """Have our kernel multiply by the weights in 16 bits; how many calls it has.

    A bias, an activation and a sum or product with another tensor behind go into the same call.
    """
    found = list(_Products(model).found())
    at = {product.nodes[-1].name: product.call() for product in found}
    gone = {node.name for product in found for node in product.nodes}
    nodes = [at.get(n.name, n) for n in model.graph.node if n.name in at or n.name not in gone]
    read = {name for node in nodes for name in node.input}
    read |= {value.name for value in model.graph.output}
    del model.graph.node[:]
    model.graph.node.extend(node for node in nodes if read.intersection(node.output))
    if found and all(opset.domain != DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return len(found)


class _Product:
    """A product and what follows it. nodes: those that its call stands for, in their order."""

    def __init__(self, node: onnx.NodeProto, weight: str) -> None:
        self.nodes = [node]
        self.bias, self.alpha, self.other, self.joined = "", 0.0, "", 0
        self._weight = weight

    def call(self) -> onnx.NodeProto:
        """The call in place of all nodes, with the name and the output of the last."""
        inputs = [self.nodes[0].input[0], self._weight, self.bias, self.other]
        while not inputs[-1]:
            inputs.pop()
        attributes: dict[str, Any] = {
            "transposed": int(_transposed(self.nodes[0])),
            "alpha": self.alpha,
            "joined": self.joined,
        }
        last = self.nodes[-1]
        return helper.make_node(UPCAST, inputs, last.output, last.name, domain=DOMAIN, **attributes)


class _Products:
    """Who makes and who reads which tensor of a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._nodes = list(model.graph.node)
        self._makers = {name: node for node in self._nodes for name in node.output}
        self._stored = {t.name: t for t in model.graph.initializer}
        self._users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self._nodes:
            for name in node.input:
                self._users[name].append(node)
        self._outputs = {value.name for value in model.graph.output}
        self._taken: set[str] = set()

    def found(self) -> Iterator[_Product]:
        """All products of the graph by weights in 16 bits."""
        for node in self._nodes:
            weight = self._weight(node)
            if weight:
                product = _Product(node, weight)
                self._follow(product)
                self._taken |= {node.name for node in product.nodes}
                yield product

    def _weight(self, node: onnx.NodeProto) -> str:
        """The stored tensor in 16 bits that a product upcasts, "" for another node."""
        maker = self._makers.get(node.input[1]) if len(node.input) == 2 else None
        if maker is None or maker.op_type != "Cast" or not _reads_halves(node, 1):
            return ""
        tensor = self._stored.get(maker.input[0])
        return tensor.name if tensor is not None and tensor.data_type in TYPES.values() else ""

    def _follow(self, product: _Product) -> None:
        """Take what stands behind a product, in the order in which a call has it."""
        last = product.nodes[-1]
        after = self._only_user(last)
        if after is not None and after.op_type == "Add":
            other = _other(after, last)
            tensor = self._stored.get(other)
            if tensor is not None and len(tensor.dims) == 1:
                product.bias = other
                product.nodes.append(after)
                last, after = after, self._only_user(after)
        if after is not None and (after.domain, after.op_type) == (CONTRIB, "QuickGelu"):
            product.alpha = float(attribute(after, "alpha"))
            product.nodes.append(after)
            last, after = after, self._only_user(after)
        if after is not None and (after.domain, after.op_type) in (("", "Add"), ("", "Mul")):
            other = _other(after, last)
            if other in self._makers:  # of the same shape in every model: a residual, a gate
                product.other = other
                product.joined = _SUM if after.op_type == "Add" else _PRODUCT
                product.nodes.append(after)

    def _only_user(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The node that alone reads what another makes, unless a call stands for it already."""
        (made,) = node.output
        users = self._users[made]
        if len(users) != 1 or made in self._outputs or users[0].name in self._taken:
            return None
        return users[0]


def _other(node: onnx.NodeProto, of: onnx.NodeProto) -> str:
    """The input of a node of two that another one does not make; "" where it makes both."""
    return next((name for name in node.input if name not in of.output), "")


def lone_products(
    inputs: int, outputs: int, copies: int, transposed: bool, weight: bytes, kind: int
) -> onnx.ModelProto:
    """A graph of so many products of x [rows, inputs], each by a matrix of its own, to be timed.

    weight: the bytes of a matrix, kind: their type; those in 16 bits are upcast. The others hold
    the same numbers in another order: of equal products ONNX Runtime computes one alone.
    """
    shape = [outputs, inputs] if transposed else [inputs, outputs]
    nodes, tensors = list[onnx.NodeProto](), list[onnx.TensorProto]()
    for i in range(copies):
        turned = weight[_TURNED * i :] + weight[: _TURNED * i]
        tensors.append(helper.make_tensor(f"w.{i}", kind, shape, turned, raw=True))
        read = f"w.{i}"
        if kind != TensorProto.FLOAT:
            nodes.append(_cast(read, f"w.{i}/upcast"))
            read = f"w.{i}/upcast"
        op, domain, attributes = "MatMul", "", dict[str, Any]()
        if transposed:
            op, domain, attributes = "FusedMatMul", CONTRIB, _TRANSPOSED
        nodes.append(
            helper.make_node(op, ["x", read], [f"y.{i}"], f"y.{i}", domain=domain, **attributes)
        )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])
    names = [f"y.{i}" for i in range(copies)]
    ys = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", outputs]) for n in names]
    graph = helper.make_graph(nodes, "products", [x], ys, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
