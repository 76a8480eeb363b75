"""Probes: single matrix products that measure this machine's peaks in ONNX Runtime.

A right-hand matrix stored in the graph is packed once, as weights are; the memory probe reads its
matrix from an input.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.engines.backends import Peaks
from edgevlm.engines.backends.common import best_seconds
from edgevlm.toolkit.target import saturates_int8

FLOAT, INT8, MEMORY = "probe-arithmetic.onnx", "probe-int8.onnx", "probe-memory.onnx"
PROBES = (FLOAT, INT8, MEMORY)
_WIDTH = 2048


def write(folder: Path) -> tuple[str, ...]:
    """Write the graphs of all probes; returns their names."""
    from onnx import helper

    (folder / FLOAT).write_bytes(
        _graph([_filled("w", 1.0, _WIDTH, _WIDTH), helper.make_node("MatMul", ["x", "w"], ["y"])])
    )
    (folder / INT8).write_bytes(_graph(_integer_product()))
    (folder / MEMORY).write_bytes(
        _graph([helper.make_node("MatMul", ["x", "w"], ["y"])], inputs=("x", "w"))
    )
    return PROBES


def _integer_product() -> list[Any]:
    """x rounded to 8 bits times a weight in 8 bits, signed where that is faster and right."""
    from onnx import helper

    weight, zero = (2, 128) if saturates_int8() else (np.int8(2), np.int8(0))
    return [
        _filled("w", weight, _WIDTH, _WIDTH),
        *(_filled(name, 1.0, 1) for name in ("one", "scale")),
        _filled("middle", 128, 1),
        _filled("zero", zero, 1),
        helper.make_node("QuantizeLinear", ["x", "one", "middle"], ["codes"]),
        helper.make_node(
            "MatMulIntegerToFloat",
            ["codes", "w", "one", "scale", "middle", "zero"],
            ["y"],
            domain="com.microsoft",
        ),
    ]


def _filled(name: str, value: float | np.int8, *shape: int) -> Any:
    """A node that makes a constant tensor: a file of a few bytes instead of megabytes."""
    from onnx import TensorProto, helper

    kinds = {int: TensorProto.UINT8, np.int8: TensorProto.INT8, float: TensorProto.FLOAT}
    kind = kinds[type(value)]
    sizes = helper.make_node("Constant", [], [f"{name}.shape"], value_ints=list(shape))
    one = helper.make_tensor(
        "value", kind, [1], [float(value) if kind == TensorProto.FLOAT else int(value)]
    )
    return sizes, helper.make_node("ConstantOfShape", [f"{name}.shape"], [name], value=one)


def _graph(nodes: list[Any], inputs: tuple[str, ...] = ("x",)) -> bytes:
    from onnx import TensorProto, helper

    flat = [n for node in nodes for n in (node if isinstance(node, tuple) else (node,))]
    ports = [
        helper.make_tensor_value_info(port, TensorProto.FLOAT, [None, None])
        for port in (*inputs, "y")
    ]
    graph = helper.make_graph(flat, "probe", ports[:-1], ports[-1:])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def measure(folder: Path, open_session: Callable[[str], Any]) -> Peaks:
    """Arithmetic in products of 2048 rows; memory rate of the product of one row and 256 MB."""
    tall, row = (np.ones((rows, _WIDTH), np.float32) for rows in (2048, 1))
    matrix = np.ones((_WIDTH, 32768), np.float32)
    float32, quantized, memory = (open_session(str(folder / name)) for name in PROBES)
    work = 2 * tall.size * _WIDTH / 1e9
    return Peaks(
        work / best_seconds(lambda: float32.run(None, {"x": tall})),
        work / best_seconds(lambda: quantized.run(None, {"x": tall})),
        matrix.nbytes / 1e9 / best_seconds(lambda: memory.run(None, {"x": row, "w": matrix})),
    )
