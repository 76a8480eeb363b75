"""How one of our functions becomes a target's own op: one small function each.

A swap takes the call and returns the nodes that stand in its place; capabilities.py says which
targets use it.
"""

from __future__ import annotations

import numpy as np
import onnx

from edgevlm.engines.lowering.graph import CONTRIB, Rewriter, attribute


def add_rms_norm(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """SkipSimplifiedLayerNormalization also returns the sum."""
    normed, total = node.output
    return [
        r.node(
            f"{CONTRIB}.SkipSimplifiedLayerNormalization",
            node.input,
            [normed, "", "", total],
            node.name,
            epsilon=attribute(node, "epsilon"),
        )
    ]


def add_layer_norm(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """SkipLayerNormalization also returns the sum."""
    normed, total = node.output
    return [
        r.node(
            f"{CONTRIB}.SkipLayerNormalization",
            node.input,
            [normed, "", "", total],
            node.name,
            epsilon=attribute(node, "epsilon"),
        )
    ]


def quick_gelu(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """The contrib op of the same name."""
    alpha = attribute(node, "alpha")
    return [r.node(f"{CONTRIB}.QuickGelu", node.input, node.output, node.name, alpha=alpha)]


def swiglu(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """silu is QuickGelu with alpha 1: one pass instead of Sigmoid and Mul."""
    gate, up = node.input
    active = f"{node.name}/silu"
    return [
        r.node(f"{CONTRIB}.QuickGelu", [gate], [active], active, alpha=1.0),
        r.node("Mul", [active, up], node.output, node.name),
    ]


def unembed(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """A product that reads the table as it is stored."""
    return [
        r.node(
            f"{CONTRIB}.FusedMatMul",
            node.input,
            node.output,
            node.name,
            alpha=1.0,
            transA=0,
            transB=1,
            transBatchA=0,
            transBatchB=0,
        )
    ]


def blocked_linear(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """MatMulNBits reads the stored bytes; it rounds its input to 8 bits, block by block."""
    x, stored, scale, _ = node.input
    names = {"K": "K", "N": "N", "bits": "bits", "block_size": "block"}
    sizes = {theirs: int(attribute(node, ours)) for theirs, ours in names.items()}
    blocks = sizes["K"] // sizes["block_size"]
    shape = (sizes["N"], blocks, sizes["block_size"] * sizes["bits"] // 8)
    inputs = [x, r.as_bytes(stored, shape), scale]
    op = f"{CONTRIB}.MatMulNBits"
    return [r.node(op, inputs, node.output, node.name, accuracy_level=4, **sizes)]


def plain_attention(node: onnx.NodeProto) -> bool:
    """Whether an Attention call is [B, S, heads * d] three times, without mask or past."""
    heads = {a.name: a.i for a in node.attribute if a.name.endswith("_num_heads")}
    return len(node.input) == 3 and len(heads) == 2 and len(set(heads.values())) == 1


def multi_head_attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """MultiHeadAttention goes over the scores in tiles and never holds all of them."""
    op, heads = f"{CONTRIB}.MultiHeadAttention", attribute(node, "q_num_heads")
    return [r.node(op, node.input, node.output, node.name, num_heads=heads)]


def rotary_attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """q and k rotated by RotaryEmbedding as they are stored, then MultiHeadAttention."""
    q, k, v, angles = node.input
    heads, places = attribute(node, "head_split")[2], _every_place(q, r)
    cos = r.once("Cos", [angles], f"{angles}.cos")
    sin = r.once("Sin", [angles], f"{angles}.sin")
    named = {"q": q, "k": k}
    rotated = [_rotated(node, r, n, x, heads, (cos, sin, places)) for n, x in named.items()]
    inputs = [*(t.output[0] for t in rotated), v]
    attend = f"{CONTRIB}.MultiHeadAttention"
    return [*rotated, r.node(attend, inputs, node.output, node.name, num_heads=heads)]


def _every_place(x: str, r: Rewriter) -> str:
    """0, 1, … for every row of [B, S, ...], as [B, S]: once per graph."""
    zero, one = (r.constant(f"places.{n}", np.asarray(n, np.int64)) for n in (0, 1))
    sizes = r.once("Shape", [x], "places.sizes", start=0, end=2)
    length = r.once("Gather", [sizes, one], "places.length", axis=0)
    row = r.once("Range", [zero, length, one], "places.row")
    return r.once("Expand", [row, sizes], "places")


def _rotated(
    node: onnx.NodeProto, r: Rewriter, label: str, x: str, heads: int, table: tuple[str, str, str]
) -> onnx.NodeProto:
    """x [B, S, heads * d] rotated by (cos, sin, positions), half against half."""
    name = f"{node.name}/{label}_rotated"
    return r.node(
        "RotaryEmbedding",
        [x, *table],
        [name],
        name,
        interleaved=0,
        rotary_embedding_dim=0,
        num_heads=heads,
    )


def head_width(node: onnx.NodeProto) -> int:
    """Channels of a head in a CachedAttention call, from its scale of 1 / sqrt(width)."""
    scale: float = attribute(node, "scale")
    return round(1 / scale**2)


def windowed(node: onnx.NodeProto) -> bool:
    """Whether a CachedAttention call sees the last positions only."""
    return int(attribute(node, "window")) > 0


def group_query_attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """GroupQueryAttention rotates, writes the cache in place and masks by length by itself."""
    q, k, v, key, value, cos, sin, positions, _ = node.input
    return [_attend(node, r, [q, k, v, key, value, *_lengths(positions, r), cos, sin], rotary=1)]


def rotary_then_group_query_attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """The same with the rotation in a node of its own."""
    q, k, v, key, value, cos, sin, positions, _ = node.input
    table = cos, sin, positions
    rotated_q = _rotated(node, r, "q", q, attribute(node, "head_split")[2], table)
    rotated_k = _rotated(node, r, "k", k, attribute(node, "kv_split")[2], table)
    inputs = [rotated_q.output[0], rotated_k.output[0], v, key, value, *_lengths(positions, r)]
    return [rotated_q, rotated_k, _attend(node, r, inputs, rotary=0)]


def _attend(node: onnx.NodeProto, r: Rewriter, inputs: list[str], rotary: int) -> onnx.NodeProto:
    return r.node(
        f"{CONTRIB}.GroupQueryAttention",
        inputs,
        node.output,
        node.name,
        num_heads=attribute(node, "head_split")[2],
        kv_num_heads=attribute(node, "kv_split")[2],
        scale=attribute(node, "scale"),
        do_rotary=rotary,
        rotary_interleaved=0,
        local_window_size=attribute(node, "window"),
    )


def _lengths(positions: str, r: Rewriter) -> list[str]:
    """Cached tokens after this call less one, per row, and the largest total: once per graph."""
    last = r.constant("gqa.last", np.asarray([-1], np.int64))
    end = r.constant("gqa.end", np.asarray([np.iinfo(np.int64).max], np.int64))
    axis = r.constant("gqa.axis", np.asarray([1], np.int64))
    column = r.once("Slice", [positions, last, end, axis], "gqa.column")
    flat = r.once("Squeeze", [column, axis], "gqa.length64")
    lengths = r.once("Cast", [flat], "gqa.lengths", to=onnx.TensorProto.INT32)
    one = r.constant("gqa.one", np.asarray(1, np.int32))
    largest = r.once("ReduceMax", [lengths], "gqa.largest", keepdims=0)
    return [lengths, r.once("Add", [largest, one], "gqa.total")]
