"""How our functions become what ONNX Runtime's CUDA kernels take: one small function each."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from edgevlm.engines.lowering import rewrites
from edgevlm.engines.lowering import tensorrt_older as older
from edgevlm.engines.lowering.graph import CONTRIB, Body, Rewriter
from edgevlm.toolkit.quantization.blockwise import BLOCK_SIZES

BY_OUTPUT = ".by_output"  # behind the name of a weight that is stored by channel: [outputs, inputs]


def group_query_attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """GroupQueryAttention rotates, writes the cache in place and masks by length."""
    cos, sin, positions = node.input[5:8]
    inside = (*_sizes(node, r), _like_the_model(cos, r), _like_the_model(sin, r))
    return [rewrites.attend(node, r, [*node.input[:5], *inside], rotary=1)]


def rotary_then_group_query_attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """The same with the rotation in a node of its own."""
    cos, sin, positions = node.input[5:8]
    table = (_like_the_model(cos, r), _like_the_model(sin, r), positions)
    return rewrites.rotated_first(node, r, table, _sizes(node, r))


def _sizes(node: onnx.NodeProto, r: Rewriter) -> tuple[str, str]:
    """Per row the cached tokens minus one; and the size of the cache for the largest number.

    The kernel reads the largest number on the processor. That of a call would be computed on the
    card and copied back, which no CUDA graph can hold; the cache's size is known beforehand, and
    the numbers of the rows say where attention ends. Max of one number is that number: of a Cast
    alone, ONNX's inference of shapes would hand on an int64, which the kernel's refuses.
    """
    size = r.once("Shape", [node.input[3]], "gqa.size64", start=2, end=3)
    number = r.once("Cast", [size], "gqa.size32", to=TensorProto.INT32)
    total = r.once("Max", [number], "gqa.size")
    return rewrites.lengths(node.input[7], r), total


def _like_the_model(table: str, r: Rewriter) -> str:
    """A float32 table in the model's own format: kernels take no mixture."""
    return r.once("Cast", [table], f"{table}.like_the_model", to=r.float_type)


def rotary_attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """q and k rotated by RotaryEmbedding as they are stored, then MultiHeadAttention."""
    q, _, _, angles = node.input
    cos = r.once("Cos", [angles], f"{angles}.cos")
    sin = r.once("Sin", [angles], f"{angles}.sin")
    positions = rewrites.every_position(q, r)
    table = (_like_the_model(cos, r), _like_the_model(sin, r), positions)
    return rewrites.rotated_attention(node, r, table)


def cached_attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """In simple ops, for formats and heads that no kernel takes; the cache is written in place."""
    return older.cached_attention(node, r, _scatter)


def _scatter(b: Body, past: str, new: str, positions: str, present: str, name: str) -> None:
    """The cache [B, heads, context, d] with `new` [B, heads, S, d] at its positions."""
    r = b.rewriter
    places = r.constant("ints.1_3", np.asarray([1, 3]))
    rows = r.once("Unsqueeze", [positions, places], "cache.at")
    shape = b("Shape", [new], f"{name}_shape")
    indices = b("Expand", [rows, shape], f"{name}_at")
    label, inputs = f"{b.name}/{name}_written", [past, indices, new]
    b.nodes += [r.node("ScatterElements", inputs, [present], label, axis=2, reduction="none")]


def swish(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """silu is QuickGelu with alpha 1, which we record."""
    return [r.node(f"{CONTRIB}.QuickGelu", node.input, node.output, node.name, alpha=1.0)]


def reduce_max(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """The largest of one axis, as TopK finds it."""
    x, axes = node.input
    (axis,) = onnx.numpy_helper.to_array(r.tensor(axes)).tolist()
    b, one = Body(node.name, r), r.constant("ints.1", np.asarray([1]))
    f32 = b("Cast", [x], "f32", to=TensorProto.FLOAT)
    options = {"axis": axis, "largest": 1, "sorted": 1}
    largest, _ = b.several("TopK", [f32, one], "largest", 2, **options)
    like = b("CastLike", [largest, x], "like")
    if next((a.i for a in node.attribute if a.name == "keepdims"), 1):
        return b.ending("Identity", [like], node.output)
    return b.ending("Squeeze", [like, axes], node.output)


def in_float32(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """The same op between casts, where it has no kernel for the model's format."""
    floats = len(node.input) if node.op_type == "Clip" else 1  # the others take axes behind x
    b = Body(node.name, r)
    inputs = [
        b("Cast", [name], f"f32_{number}", to=TensorProto.FLOAT) if number < floats else name
        for number, name in enumerate(node.input)
    ]
    inner = r.node(node.op_type, inputs, [f"{node.name}/in_f32"], f"{node.name}/in_f32")
    inner.attribute.extend(node.attribute)
    b.nodes.append(inner)
    return b.ending("CastLike", [inner.output[0], node.input[0]], node.output)


def blocked_linear(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """MatMulNBits reads the stored bytes; its input stays in the model's format."""
    return [rewrites.by_blocks(node, r, accuracy_level=0)]


def row_quantize(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """Nothing: the product reads the input itself."""
    return []


def row_quantized_linear(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """MatMulNBits of 8 bits, whose blocks of an output all have that output's scale.

    It reads weights as [outputs, inputs], we store [inputs, outputs]: the backend writes them anew.
    """
    codes, _, stored, scale = node.input
    (x,) = r.maker(codes).input
    k, n = r.shape_of(stored)
    block = next((size for size in BLOCK_SIZES if k % size == 0), BLOCK_SIZES[-1])
    blocks = -(-k // block)
    inputs = [
        x,
        r.again(stored, stored + BY_OUTPUT, (n, blocks, block)),
        r.again(scale, scale + BY_OUTPUT, (n, blocks)),
    ]
    sizes = {"K": k, "N": n, "bits": 8, "block_size": block, "accuracy_level": 0}
    return [r.node(f"{CONTRIB}.MatMulNBits", inputs, node.output, node.name, **sizes)]
