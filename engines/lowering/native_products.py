"""Calls of our own products in a graph that has our calls for rows already: what scales, adds or
gates their sums goes into them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgevlm.engines.lowering.graph import CONTRIB, attribute
from edgevlm.engines.lowering.native import ACTIVATE, ONTO, SCALE
from edgevlm.engines.lowering.native_decoder import GATE, NORM, SUM
from edgevlm.engines.native.library import DOMAIN
from edgevlm.toolkit.quantization.channels import ZERO_POINT

PRODUCT, PRODUCT_ONTO = "RoundedProduct", "RoundedProductOnto"
ACTIVATED, GATED = "ActivatedProduct", "GatedProduct"
_JOINED = {SCALE: PRODUCT, ONTO: PRODUCT_ONTO, ACTIVATE: ACTIVATED, GATE: GATED, SUM: PRODUCT_ONTO}
_TOGETHER = 4  # inputs of a weight that the kernel multiplies at once


def call_products(model: onnx.ModelProto) -> int:
    """Have our kernels compute products with weights in signed 8 bits; how many calls."""
    products = _Products(model)
    nodes = [made for node in model.graph.node for made in products.replaced(node)]
    kept = [node for node in nodes if node.name not in products.gone]
    if not products.gone:
        return 0
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(products.zeros.values())
    return sum(node.op_type in (PRODUCT, PRODUCT_ONTO, ACTIVATED, GATED) for node in kept)


class _Products:
    """gone: names of products that calls replace. zeros: biases of those without one."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.gone: set[str] = set()
        self.zeros: dict[str, onnx.TensorProto] = {}
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._users = Counter(name for node in model.graph.node for name in node.input)
        self._products = {
            node.output[0]: node for node in model.graph.node if self._is_product(node)
        }

    def replaced(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes in place of one."""
        if node.domain != DOMAIN or node.op_type not in _JOINED:
            return [node]
        count = 2 if node.op_type == GATE else 1
        products = [self._products.get(name) for name in node.input[:count]]
        found = [product for product in products if product is not None]
        if len(found) < count or any(p.input[0] != found[0].input[0] for p in found):
            return [node]
        self.gone |= {product.name for product in found}
        codes, steps = found[0].input[0], node.input[count]
        weights = [name for product in found for name in (product.input[1], product.input[3])]
        rows = [codes, steps, *weights]
        if node.op_type == SUM:
            return self._summed(node, rows, weights[0])
        inputs = [*rows, *node.input[count + 1 :]]
        call = _call(_JOINED[node.op_type], inputs, node.output, node.name)
        call.attribute.extend(node.attribute)
        return [call]

    def _summed(self, node: onnx.NodeProto, rows: list[str], weight: str) -> list[onnx.NodeProto]:
        """A product that is added to what there is, and a norm of both."""
        _, _, other, norm = node.input
        total, *rounded = node.output
        onto = [*rows, self._no_bias(weight), other]
        epsilon = float(attribute(node, "epsilon"))
        return [
            _call(PRODUCT_ONTO, onto, [total], f"{node.name}/product"),
            _call(NORM, [total, norm], rounded, node.name, epsilon=epsilon),
        ]

    def _is_product(self, node: onnx.NodeProto) -> bool:
        """Whether it is of rows with our zero point and a stored weight in signed bytes, and alone
        reads it, as the kernel keeps a copy in place of it.
        """
        if node.op_type != "MatMulIntegerToFloat" or len(node.input) != 6:
            return False
        _, weight, one, scale, zero, middle = node.input
        if not all(name in self._stored for name in (weight, one, scale, zero)):
            return False
        stored = self._stored[weight]
        fits = stored.data_type == TensorProto.INT8 and stored.dims[0] % _TOGETHER == 0
        alone = self._users[weight] == 1 and self._users[node.output[0]] == 1
        numbers = [self._number(one) == 1, self._number(zero) == ZERO_POINT]
        return fits and alone and all(numbers) and (not middle or self._number(middle) == 0)

    def _number(self, name: str) -> float:
        """The value of a stored number; NaN of what is none."""
        if name not in self._stored:
            return float("nan")
        values = numpy_helper.to_array(self._stored[name])
        return float(values) if values.ndim == 0 else float("nan")

    def _no_bias(self, weight: str) -> str:
        width = self._stored[weight].dims[1]
        name = f"native.no_bias.{width}"
        if name not in self._stored:
            self.zeros[name] = numpy_helper.from_array(np.zeros(width, np.float32), name)
        return name


def _call(
    op: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any
) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name, domain=DOMAIN, **attributes)


def lone_products(inputs: int, outputs: int, copies: int) -> onnx.ModelProto:
    """A graph of lowered products of the same rows with weights of their own, to be timed: codes
    [rows, inputs], steps [rows, 1] -> y.0, y.1, ... [rows, outputs]. No two weights are equal: of
    equal products ONNX Runtime computes one alone.
    """
    weight = np.random.default_rng(0).integers(-127, 128, (inputs, outputs), np.int8)
    numbers: dict[str, Any] = {
        "one": np.asarray(1, np.float32),
        "scale": np.full(outputs, 0.01, np.float32),
        "zero": np.asarray(ZERO_POINT, np.uint8),
    }
    stored = [numpy_helper.from_array(x, name) for name, x in numbers.items()]
    nodes = list[onnx.NodeProto]()
    for i in range(copies):
        stored.append(numpy_helper.from_array(np.roll(weight, i), f"w.{i}"))
        rows = ["codes", f"w.{i}", "one", "scale", "zero", ""]
        op = {"op_type": "MatMulIntegerToFloat", "domain": CONTRIB}
        nodes += [
            helper.make_node(**op, inputs=rows, outputs=[f"sums.{i}"], name=f"sums.{i}"),
            helper.make_node("Mul", [f"sums.{i}", "steps"], [f"y.{i}"], f"y.{i}"),
        ]
    floats, codes = TensorProto.FLOAT, TensorProto.UINT8
    given = [
        helper.make_tensor_value_info("codes", codes, [None, inputs]),
        helper.make_tensor_value_info("steps", floats, [None, 1]),
    ]
    made = [helper.make_tensor_value_info(f"y.{i}", floats, [None, outputs]) for i in range(copies)]
    graph = helper.make_graph(nodes, "products", given, made, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
