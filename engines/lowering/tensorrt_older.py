"""Attention, rotation, the KV cache and norms in ops that TensorRT 10.3 and 10.13 take.

The cache is written by a product with ones at (row of the cache, token): exact, for sequences at
different positions too, and made of ops that every release has. It is written whole, not in place,
so the runtime needs two buffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto

from edgevlm.engines.lowering.graph import Body, Rewriter, attribute

# Nodes for: a cache, new rows, their positions, the name of the new cache, and that of the part.
Write = Callable[[Body, str, str, str, str, str], None]
_LOWEST = float(np.finfo(np.float32).min)


def rms_norm(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """The norm in float32, scaled in the model's own format."""
    x, weight = node.input
    b = Body(node.name, r)
    f32 = b("Cast", [x], "f32", to=TensorProto.FLOAT)
    squares = b("Mul", [f32, f32], "squares")
    mean = b("ReduceMean", [squares, b.ints(-1)], "mean", keepdims=1)
    floor = b("Add", [mean, b.float32(attribute(node, "epsilon"))], "floor")
    normed = b("Div", [f32, b("Sqrt", [floor], "norm")], "normed_f32")
    return b.ending("Mul", [b("CastLike", [normed, x], "normed"), weight], node.output)


def attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """Plain attention over joined heads [B, S, heads * d]."""
    heads = int(attribute(node, "q_num_heads"))
    b = Body(node.name, r)
    q, k, v = (b.heads(x, heads, name) for x, name in zip(node.input, "qkv", strict=True))
    width = b("Shape", [q], "width", start=3, end=4)  # head_dim is not an attribute here
    f32 = b("Cast", [width], "width_f32", to=TensorProto.FLOAT)
    scale = b("Div", [b.float32(1.0), b("Sqrt", [f32], "root")], "scale")
    return b.joined(attended(b, q, k, v, scale, None), node.output)


def rotary_attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """Plain attention with q and k rotated by angles [S, d / 2] in float32."""
    *qkv, angles = node.input
    heads, head_dim = (int(attribute(node, name)) for name in ("num_heads", "head_dim"))
    b = Body(node.name, r)
    table = (r.once("Cos", [angles], f"{angles}.cos"), r.once("Sin", [angles], f"{angles}.sin"))
    q, k, v = (b.heads(x, heads, name) for x, name in zip(qkv, "qkv", strict=True))
    scale = b.float32(1 / math.sqrt(head_dim))
    q, k = (_rotated(b, x, table, name) for x, name in ((q, "q"), (k, "k")))
    return b.joined(attended(b, q, k, v, scale, None), node.output)


def cached_attention(
    node: onnx.NodeProto, r: Rewriter, write: Write | None = None
) -> list[onnx.NodeProto]:
    """Rotary attention over a cache of static length, written at positions[:, 0].

    write: puts new rows into a cache; by default with a product.
    """
    write = write or _write
    q, k, v, past_key, past_value, cos, sin, positions, mask = node.input
    y, present_key, present_value = node.output
    heads, kv_heads, head_dim = (
        int(attribute(node, name)) for name in ("num_heads", "num_kv_heads", "head_dim")
    )
    b = Body(node.name, r)
    table = (_at_positions(r, cos, positions), _at_positions(r, sin, positions))
    rotated = _rotated(b, b.heads(q, heads, "q"), table, "q")
    key = _rotated(b, b.heads(k, kv_heads, "k"), table, "k")
    value = b.heads(v, kv_heads, "v")
    write(b, past_key, key, positions, present_key, "key")
    write(b, past_value, value, positions, present_value, "value")
    groups = heads // kv_heads
    key, value = present_key, present_value
    if groups > 1:  # each head of keys and values serves `groups` of queries
        middle = b.ints(2)
        rotated = b("Reshape", [rotated, b.ints(0, kv_heads, groups, -1, head_dim)], "q_groups")
        key = b("Unsqueeze", [key, middle], "key_groups")
        value = b("Unsqueeze", [value, middle], "value_groups")
        mask = r.once("Unsqueeze", [mask, middle], f"{mask}.groups")
    scale = b.float32(float(attribute(node, "scale")))
    mixed = attended(b, rotated, key, value, scale, mask)
    if groups > 1:
        mixed = b("Reshape", [mixed, b.ints(0, heads, -1, head_dim)], "mixed_heads")
    return b.joined(mixed, [y])


def attended(b: Body, q: str, k: str, v: str, scale: str, mask: str | None) -> str:
    """softmax(q k^T * scale) v over the last two axes, the Softmax in float32."""
    rank = 5 if mask is not None and mask.endswith(".groups") else 4
    perm = [*range(rank - 2), rank - 1, rank - 2]
    scaled = b("Mul", [q, b("CastLike", [scale, q], "scale_like")], "q_scaled")
    scores = b("MatMul", [scaled, b("Transpose", [k], "k_transposed", perm=perm)], "scores")
    f32 = b("Cast", [scores], "scores_f32", to=TensorProto.FLOAT)
    if mask is not None:
        f32 = b("Where", [mask, f32, b.float32(_LOWEST)], "masked")
    shares = b("CastLike", [b("Softmax", [f32], "shares_f32", axis=-1), v], "shares")
    return b("MatMul", [shares, v], "mixed")


def _rotated(b: Body, x: str, table: tuple[str, str], name: str) -> str:
    """x [B, heads, S, d] rotated in float32 by (cos, sin), half against half."""
    cos, sin = table
    f32 = b("Cast", [x], f"{name}_f32", to=TensorProto.FLOAT)
    first, second = b.several("Split", [f32], f"{name}_half", 2, axis=-1, num_outputs=2)
    left = [
        b("Mul", [h, t], f"{name}_{n}") for h, t, n in ((first, cos, "ac"), (second, sin, "bs"))
    ]
    right = [
        b("Mul", [h, t], f"{name}_{n}") for h, t, n in ((second, cos, "bc"), (first, sin, "as"))
    ]
    halves = [b("Sub", left, f"{name}_left"), b("Add", right, f"{name}_right")]
    joined = b("Concat", halves, f"{name}_rotated_f32", axis=-1)
    return b("CastLike", [joined, x], f"{name}_rotated")


def _at_positions(r: Rewriter, table: str, positions: str) -> str:
    """Rows of a table at positions [B, S], as [B, 1, S, d / 2]; once per graph."""
    rows = r.once("Gather", [table, positions], f"{table}.rows", axis=0)
    return r.once("Unsqueeze", [rows, r.constant("ints.1", np.asarray([1]))], f"{table}.heads")


def _write(b: Body, past: str, new: str, positions: str, present: str, name: str) -> None:
    """The cache [B, heads, context, d] with `new` [B, heads, S, d] at its positions."""
    r = b.rewriter
    first, second = (r.constant(f"ints.{n}", np.asarray([n])) for n in (0, 1))
    last = r.constant("ints.-1", np.asarray([-1]))
    end = r.constant("cache.end", np.asarray([np.iinfo(np.int64).max]))
    zero, one = (r.constant(f"int.{n}", np.asarray(n)) for n in (0, 1))
    length = r.once(
        "Squeeze", [r.once("Shape", [past], "cache.shape", start=2, end=3)], "cache.length"
    )
    row = r.once("Range", [zero, length, one], "cache.rows")
    column = r.once("Unsqueeze", [row, second], "cache.column")  # [context, 1]
    at = r.once("Unsqueeze", [positions, r.constant("ints.1_2", np.asarray([1, 2]))], "cache.at")
    hits = r.once("Equal", [column, at], "cache.hits")  # [B, 1, context, S]
    ones = r.once("CastLike", [hits, new], "cache.ones")
    axis = r.constant("ints.3", np.asarray([3]))
    start = r.once("Slice", [at, first, second, axis], "cache.start")
    stop = r.once("Slice", [at, last, end, axis], "cache.stop")
    behind = r.once("GreaterOrEqual", [column, start], "cache.behind")
    before = r.once("LessOrEqual", [column, stop], "cache.before")
    written = r.once("And", [behind, before], "cache.written")
    placed = b("MatMul", [ones, new], f"{name}_placed")
    b.nodes += [r.node("Where", [written, placed, past], [present], f"{b.name}/{name}_written")]
