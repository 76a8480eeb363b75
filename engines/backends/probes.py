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

FLOAT, INT8, MEMORY = "probe-arithmetic.onnx", "probe-int8.onnx", "probe-memory.onnx"
PROBES = (FLOAT, INT8, MEMORY)
_WIDTH, _BLOCK = 2048, 128


def write(folder: Path) -> tuple[str, ...]:
    """Write the graphs of all probes; returns their names."""
    from onnx import helper

    (folder / FLOAT).write_bytes(
        _graph([_filled("w", 1.0, _WIDTH, _WIDTH), helper.make_node("MatMul", ["x", "w"], ["y"])])
    )
    product = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=_WIDTH,
        N=_WIDTH,
        bits=8,
        block_size=_BLOCK,
        accuracy_level=4,
    )
    blocks = _WIDTH // _BLOCK
    weight = _filled("w", 129, _WIDTH, blocks, _BLOCK)
    (folder / INT8).write_bytes(_graph([weight, _filled("s", 1.0, _WIDTH, blocks), product]))
    (folder / MEMORY).write_bytes(
        _graph([helper.make_node("MatMul", ["x", "w"], ["y"])], inputs=("x", "w"))
    )
    return PROBES


def _filled(name: str, value: float, *shape: int) -> Any:
    """A node that makes a constant tensor: a file of a few bytes instead of megabytes."""
    from onnx import TensorProto, helper

    kind = TensorProto.UINT8 if isinstance(value, int) else TensorProto.FLOAT
    sizes = helper.make_node("Constant", [], [f"{name}.shape"], value_ints=list(shape))
    one = helper.make_tensor("value", kind, [1], [value])
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
