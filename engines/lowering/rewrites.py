"""How one of our functions becomes a target's own op: one small function each.

A rewrite takes the call and returns the nodes that replace it; capabilities.py says which targets
use it.

There is none for Add and the norm behind it: ONNX Runtime's kernels for both at once are slower
than the two ops. Milliseconds, one thread, ONNX Runtime 1.31 on a processor with AVX-512:
SkipLayerNormalization 2.96 against 0.44 at [1, 577, 1024], SkipSimplifiedLayerNormalization 0.59
against 0.27 at [1, 608, 896] and 0.0022 against 0.0017 at [1, 1, 896].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from edgevlm.engines.lowering.graph import CONTRIB, Rewriter, attribute
from edgevlm.toolkit.quantization import static
from edgevlm.toolkit.quantization.channels import LARGEST, SMALLEST, ZERO_POINT


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
    return [by_blocks(node, r, accuracy_level=4)]


def by_blocks(node: onnx.NodeProto, r: Rewriter, accuracy_level: int) -> onnx.NodeProto:
    """The same. accuracy_level: 4 where inputs may be rounded to 8 bits, 0 where they stay."""
    x, stored, scale, zeros = node.input
    k, n, bits, block = (
        int(attribute(node, name)) for name in ("in_features", "out_features", "bits", "block_size")
    )
    shape = (n, k // block, block * bits // 8)
    inputs = [x, r.as_bytes(stored, shape), scale]
    if any(a.name == "zero_points" and a.i for a in node.attribute):  # otherwise all are 8 or 128
        inputs.append(r.as_bytes(zeros, (n, k // block * bits // 8)))
    op = f"{CONTRIB}.MatMulNBits"
    sizes = {"K": k, "N": n, "bits": bits, "block_size": block}
    return r.node(op, inputs, node.output, node.name, accuracy_level=accuracy_level, **sizes)


def row_quantize(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """QuantizeLinear with a block for each row: one pass for what the function says in four.

    All shapes stay known: ONNX Runtime's memory plan takes seconds where many are not.
    """
    (x,), (codes, step), name = node.input, node.output, node.name
    (width, _) = r.shape_of(next(user.input[2] for user in r.users(codes)))
    last = r.constant("row.last", np.asarray([-1]))
    tiny = r.constant("row.smallest", np.asarray(SMALLEST, np.float32))
    most = r.constant("row.steps", np.asarray(LARGEST, np.float32))
    middle = r.constant("row.zero_point", np.asarray(ZERO_POINT, np.uint8))
    first, second = (r.constant(f"row.{n}", np.asarray([n])) for n in (0, 1))
    high, low, minus, span, rows, shape, zeros = (
        f"{name}/{part}" for part in "high low minus span rows shape zeros".split()
    )
    return [
        r.node("ReduceMax", [x, last], [high], high, keepdims=1),
        r.node("ReduceMin", [x, last], [low], low, keepdims=1),
        r.node("Neg", [low], [minus], minus),
        r.node("Max", [high, minus, tiny], [span], span),
        # for inputs without rows: of an empty tensor the reduced one has the shape of x itself
        r.node("Slice", [span, first, second, last], [rows], rows),
        r.node("Div", [rows, most], [step], f"{name}/step"),
        r.node("Shape", [step], [shape], shape),
        r.node("Expand", [middle, shape], [zeros], zeros),
        r.node("QuantizeLinear", [x, step, zeros], [codes], name, axis=-1, block_size=width),
    ]


def row_quantized_linear(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """A product scaled by the outputs' steps while it is written, by the rows' after it.

    Where a bias and a scale of each output follow (LayerScale), the scale goes into the steps and
    the bias: one pass over the outputs less. ONNX Runtime multiplies constants when it loads them.
    """
    codes, step, stored, scale = node.input
    one = r.constant("row.one", np.asarray(1, np.float32))
    middle = r.constant("row.zero_point", np.asarray(ZERO_POINT, np.uint8))
    columns, outputs, behind = f"{node.name}/columns", node.output, list[onnx.NodeProto]()
    bias = r.only_user(node.output[0], "Add")
    gain = r.only_user(bias[0].output[0], "Mul") if bias else None
    if bias and gain:
        scaled, shift, outputs = f"{node.name}/gain", f"{node.name}/shift", [f"{node.name}/rows"]
        behind = [
            r.node("Mul", [scale, gain[1]], [scaled], scaled),
            r.node("Mul", [bias[1], gain[1]], [shift], shift),
            r.node("Add", [*outputs, shift], r.replace(gain[0]), bias[0].name),
        ]
        scale = scaled
    inputs = [codes, stored, one, scale, middle, middle]
    return [
        r.node(f"{CONTRIB}.MatMulIntegerToFloat", inputs, [columns], columns),
        r.node("Mul", [columns, step], outputs, node.name),
        *behind,
    ]


def rounds_to_fp8(node: onnx.NodeProto) -> bool:
    """Whether a QuantizeLinear or DequantizeLinear is of FP8."""
    return len(node.input) > 2 and str(node.input[2]).startswith(static.zero_name("fp8"))


def weight_in_fp8(node: onnx.NodeProto) -> bool:
    """Whether a DequantizeLinear makes floats of a stored weight in FP8."""
    return str(node.input[0]).endswith(static.FP8.suffix)


def weight_in_floats(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """The weight itself, declared as the floats that its codes stand for: a backend writes them."""
    r.tensor(node.input[0]).data_type = r.float_type
    return [r.node("Identity", node.input[:1], node.output, node.name)]


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
    q, _, _, angles = node.input
    positions = every_position(q, r)
    cos = r.once("Cos", [angles], f"{angles}.cos")
    sin = r.once("Sin", [angles], f"{angles}.sin")
    return rotated_attention(node, r, (cos, sin, positions))


def rotated_attention(
    node: onnx.NodeProto, r: Rewriter, table: tuple[str, str, str]
) -> list[onnx.NodeProto]:
    """The same by a table of (cos, sin, positions)."""
    q, k, v, _ = node.input
    heads = attribute(node, "num_heads")
    turned = [rotated(node, r, name, x, heads, table) for name, x in (("q", q), ("k", k))]
    inputs = [*(t.output[0] for t in turned), v]
    op = f"{CONTRIB}.MultiHeadAttention"
    return [*turned, r.node(op, inputs, node.output, node.name, num_heads=heads)]


def every_position(x: str, r: Rewriter) -> str:
    """Positions 0, 1, … of every row of [B, S, ...], as [B, S]; made once per graph."""
    zero, one = (r.constant(f"position.{n}", np.asarray(n, np.int64)) for n in (0, 1))
    sizes = r.once("Shape", [x], "position.sizes", start=0, end=2)
    length = r.once("Gather", [sizes, one], "position.length", axis=0)
    row = r.once("Range", [zero, length, one], "position.row")
    return r.once("Expand", [row, sizes], "position.every")


def rotated(
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


def heads_of(multiple: int) -> Callable[[onnx.NodeProto], bool]:
    """Whether a call's heads have a multiple of so many channels."""
    return lambda node: int(attribute(node, "head_dim")) % multiple == 0


def windowed(node: onnx.NodeProto) -> bool:
    """Whether a CachedAttention call sees the last positions only."""
    return int(attribute(node, "window")) > 0


def group_query_attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """GroupQueryAttention rotates, writes the cache in place and masks by length."""
    _, _, _, _, _, cos, sin, positions, _ = node.input
    inside = (*lengths_and_total(positions, r), cos, sin)
    return [attend(node, r, [*node.input[:5], *inside], rotary=1)]


def rotary_then_group_query_attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """The same with the rotation in a node of its own."""
    _, _, _, _, _, cos, sin, positions, _ = node.input
    return rotated_first(node, r, (cos, sin, positions), lengths_and_total(positions, r))


def rotated_first(
    node: onnx.NodeProto, r: Rewriter, table: tuple[str, str, str], sizes: tuple[str, str]
) -> list[onnx.NodeProto]:
    """q and k rotated by a table of (cos, sin, positions), then attended in cached `sizes`."""
    q, k, v, key, value, *_ = node.input
    rotated_q = rotated(node, r, "q", q, attribute(node, "num_heads"), table)
    rotated_k = rotated(node, r, "k", k, attribute(node, "num_kv_heads"), table)
    inputs = [rotated_q.output[0], rotated_k.output[0], v, key, value, *sizes]
    return [rotated_q, rotated_k, attend(node, r, inputs, rotary=0)]


def attend(node: onnx.NodeProto, r: Rewriter, inputs: list[str], rotary: int) -> onnx.NodeProto:
    """The kernel for a CachedAttention call, with its sizes, heads and window."""
    return r.node(
        f"{CONTRIB}.GroupQueryAttention",
        inputs,
        node.output,
        node.name,
        num_heads=attribute(node, "num_heads"),
        kv_num_heads=attribute(node, "num_kv_heads"),
        scale=attribute(node, "scale"),
        do_rotary=rotary,
        rotary_interleaved=0,
        local_window_size=attribute(node, "window"),
    )


def lengths_and_total(positions: str, r: Rewriter) -> tuple[str, str]:
    """`lengths`, and the largest number of cached tokens after this call. Once per graph."""
    counted = lengths(positions, r)
    one = r.constant("gqa.one", np.asarray(1, np.int32))
    largest = r.once("ReduceMax", [counted], "gqa.largest", keepdims=0)
    return counted, r.once("Add", [largest, one], "gqa.total")


def lengths(positions: str, r: Rewriter) -> str:
    """Per row the cached tokens after this call, minus one, as int32. Once per graph."""
    last = r.constant("gqa.last", np.asarray([-1], np.int64))
    end = r.constant("gqa.end", np.asarray([np.iinfo(np.int64).max], np.int64))
    axis = r.constant("gqa.axis", np.asarray([1], np.int64))
    column = r.once("Slice", [positions, last, end, axis], "gqa.column")
    flat = r.once("Squeeze", [column, axis], "gqa.length64")
    return r.once("Cast", [flat], "gqa.lengths", to=onnx.TensorProto.INT32)
