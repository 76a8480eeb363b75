"""What TensorRT's parser and builder refuse, or take and get wrong, found before they see it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import Target

_CODES = {TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN}
# Codes that the parser refuses, but for UINT8, which it clips.
_OTHERS = ("UINT8", "UINT4", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")
_REFUSED: dict[int, str] = {TensorProto.DataType.Value(name): name for name in _OTHERS}
_NAMES = {
    TensorProto.FLOAT: "fp32",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT4: "INT4",
    TensorProto.FLOAT8E4M3FN: "FP8",
}
# What compute capabilities lack.
_LACKING = {
    "sm_75": ("bf16", "INT4", "FP8"),
    "sm_80": ("FP8",),
    "sm_86": ("FP8",),
    "sm_87": ("FP8",),
}
_MENDED = {
    "FP8 does not": "cards have FP8 from sm_89 on; for others: edgevlm calibrate BUNDLE OUT --to "
    "int8-static",
    "bf16 does not": "edgevlm export SOURCE BUNDLE --dtype fp16",
    "INT4 does not": "edgevlm build BUNDLE ENGINE --precision int8",
}
_REDUCING = ("ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum", "ReduceL2")
_AXES_AT = {**dict.fromkeys(_REDUCING, 1), "Squeeze": 1, "Unsqueeze": 1}


def check(component: str, model: onnx.ModelProto, target: Target) -> None:
    """Raise UnsupportedError naming everything in a lowered graph that would fail or be wrong."""
    lacking = [*_formats(model, target)]
    found = [*_nodes(model), *_functions(model), *lacking]
    if found:
        hints = (hint for words, hint in _MENDED.items() if any(words in x for x in lacking))
        raise UnsupportedError(
            f"{component} cannot become an engine for {target}: {'; '.join(sorted(set(found)))}",
            hint="; ".join(hints),
        )


def _nodes(model: onnx.ModelProto) -> Iterator[str]:
    stored = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from _rounding(node, stored)
        vector = stored.get(node.input[0]) if node.op_type == "Softmax" else None
        if vector is not None and len(vector.dims) < 2:
            yield f"{node.name}: Softmax of one axis"
        at = _AXES_AT.get(node.op_type)
        if at is not None and len(node.input) > at and node.input[at] not in stored:
            yield f"{node.name}: axes that are computed"
    yield from _caches(model)


def _rounding(node: onnx.NodeProto, stored: dict[str, TensorProto]) -> Iterator[str]:
    """Codes are signed and symmetric: UINT8 is clipped at 127 without a word."""
    zeros = stored.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    codes = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    for tensor in (zeros, codes):
        if tensor is not None and tensor.data_type in _REFUSED:
            yield f"{node.name}: codes of type {_REFUSED[tensor.data_type]}"
    if zeros is None and codes is None:
        yield f"{node.name}: without a zero point, codes are UINT8"
    if zeros is not None and zeros.data_type in _CODES and np.any(_values(zeros)):
        yield f"{node.name}: a zero point other than 0"


def _values(tensor: TensorProto) -> Array:
    if tensor.data_location == TensorProto.EXTERNAL:
        return np.ones(1, np.float32)  # a stored zero point is one that differs
    return np.asarray(numpy_helper.to_array(tensor)).astype(np.float32)


def _caches(model: onnx.ModelProto) -> Iterator[str]:
    """A cache that is written in place is an input of the graph, and an output."""
    inputs, outputs = ({v.name for v in vs} for vs in (model.graph.input, model.graph.output))
    for node in model.graph.node:
        if node.op_type == "TensorScatter":
            axis = next((a.i for a in node.attribute if a.name == "axis"), -2)
            if axis not in (2, -2) or node.input[0] not in inputs or node.output[0] not in outputs:
                yield f"{node.name}: a cache that is not an input and an output, written on axis 2"


def _functions(model: onnx.ModelProto) -> Iterator[str]:
    """The parser knows ops by their name alone, whatever their domain."""
    for function in model.functions:
        if onnx.defs.has(function.name):
            yield f"a function called {function.name}, as a standard op is"
    for node in model.graph.node:
        if node.domain and onnx.defs.has(node.op_type):
            yield f"{node.name}: {node.domain}.{node.op_type}, taken for the standard op"


def _formats(model: onnx.ModelProto, target: Target) -> Iterator[str]:
    """Number formats that one of the target's cards lacks."""
    used = {_NAMES[t.data_type] for t in model.graph.initializer if t.data_type in _NAMES}
    for arch in target.arch.split("+"):
        for name in _LACKING.get(arch, ()):
            if name in used:
                yield f"{name} does not exist on {arch}"
        if arch == "sm_75" and _multiplies_fp32(model):
            yield f"products in fp32 do not exist on {arch}: export with --dtype fp16"


def _multiplies_fp32(model: onnx.ModelProto) -> bool:
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    products = (n for n in model.graph.node if n.op_type in ("MatMul", "Conv"))
    return any(kinds.get(name) == TensorProto.FLOAT for n in products for name in n.input[1:2])
