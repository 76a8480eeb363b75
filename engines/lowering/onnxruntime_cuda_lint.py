"""What would run on the processor, or on no card, of a graph for ONNX Runtime's CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto

from edgevlm.engines.lowering.onnxruntime_cuda_rows import KERNELS, LACKING
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.target import CUDA_CARDS, DEVICES, Target, card

_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
}
_BF16_SINCE = 80  # compute capability
_OF_SHAPES = ("Shape", "Size")
_NUMBERS = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)


def check(component: str, model: onnx.ModelProto, target: Target) -> None:
    """Raise UnsupportedError for a card without kernels, or naming every node without one."""
    _check_card(target)
    found = [*_nodes(model), *_formats(model, target)]
    if found:
        raise UnsupportedError(
            f"{component} would not run on {target} alone: {'; '.join(sorted(set(found)))}"
        )


def _check_card(target: Target) -> None:
    known = sorted({arch for cards in CUDA_CARDS.values() for arch in cards}, key=card.capability)
    if target.arch in known:
        return
    others = (n for n, d in DEVICES.items() if d.target.arch == target.arch)
    instead = next(others, f"tensorrt/{target.arch}")
    raise UnsupportedError(
        f"onnxruntime-gpu has no kernels for {target.arch}: its wheels are built for "
        f"{', '.join(known)} alone",
        hint=f"build for TensorRT, which has: --target {instead}",
    )


def _formats(model: onnx.ModelProto, target: Target) -> Iterator[str]:
    used = any(t.data_type == TensorProto.BFLOAT16 for t in model.graph.initializer)
    if used and card.capability(target.arch) < _BF16_SINCE:
        yield f"bf16 does not exist on {target.arch}: export with --dtype fp16"


def _nodes(model: onnx.ModelProto) -> Iterator[str]:
    """Nodes whose op or number format has no kernel. What constants alone decide is computed when
    the graph is loaded, and needs none.
    """
    types, constants = _types(model), {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        if node.input and all(name in constants or not name for name in node.input):
            constants.update(node.output)
            continue
        if node.op_type in ("Cos", "Sin"):
            yield f"{node.name}: {node.op_type} of what is computed"
        lacking = LACKING.get(node.op_type, ()) if node.op_type in KERNELS else ()
        if _NAMES.get(types.get(node.input[0], 0)) in lacking:
            yield f"{node.name}: {node.op_type} in {_NAMES[types[node.input[0]]]}"


def float_nodes(model: onnx.ModelProto) -> list[str]:
    """The names of the nodes that make floats, as far as types are known; others count too."""
    types = _types(model)
    return [n.name for n in model.graph.node if types.get(n.output[0], 0) not in _NUMBERS]


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """TensorProto's number of the type of every tensor, as far as it follows from its maker."""
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in graph.input}
    types |= {t.name: t.data_type for t in graph.initializer}
    for node in graph.node:
        types |= dict.fromkeys(node.output, _made(node, types))
    return types


def _made(node: onnx.NodeProto, types: dict[str, int]) -> int:
    if node.op_type == "Cast":
        return next(int(a.i) for a in node.attribute if a.name == "to")
    if node.op_type in _OF_SHAPES:
        return int(TensorProto.INT64)
    if node.op_type in ("And", "Equal", "Greater", "GreaterOrEqual", "LessOrEqual"):
        return int(TensorProto.BOOL)
    like = 1 if node.op_type in ("CastLike", "Where") else 0
    return types.get(node.input[like], 0) if len(node.input) > like else 0
