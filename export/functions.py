"""Ops that deserve a fused kernel, as ONNX functions of domain "edgevlm" with standard bodies.

Any runtime can run the body; a target that has a kernel rewrites the call
(engines/lowering/lower.py). Attributes say what the op is (num_heads, head_dim, grid), so that a
kernel needs nothing else.
"""

from __future__ import annotations

import onnx

from edgevlm.export.attention import cached_attention, rotary_attention
from edgevlm.export.blocked import blocked_embed, blocked_linear
from edgevlm.export.deform import ms_deform_attn
from edgevlm.export.nodes import function, ints, node, shape
from edgevlm.export.relative import relative_attention
from edgevlm.export.rows import row_quantize, row_quantized_linear


def quick_gelu() -> onnx.FunctionProto:
    """x * sigmoid(alpha x)."""
    return function(
        "QuickGelu",
        ["x"],
        ["y"],
        ["alpha"],
        [
            node("Constant", [], ["alpha_float"], value_float="@alpha:FLOAT"),
            node("CastLike", ["alpha_float", "x"], ["factor"]),
            node("Mul", ["x", "factor"], ["scaled"]),
            node("Sigmoid", ["scaled"], ["gate"]),
            node("Mul", ["x", "gate"], ["y"]),
        ],
    )


def swiglu() -> onnx.FunctionProto:
    """silu(gate) * up."""
    return function(
        "SwiGLU",
        ["gate", "up"],
        ["y"],
        [],
        [
            node("Swish", ["gate"], ["active"], alpha=1.0),
            node("Mul", ["active", "up"], ["y"]),
        ],
    )


def unembed() -> onnx.FunctionProto:
    """x @ weight^T, the embedding table used as the output layer."""
    return function(
        "Unembed",
        ["x", "weight"],
        ["y"],
        [],
        [
            node("Transpose", ["weight"], ["transposed"], perm=[1, 0]),
            node("MatMul", ["x", "transposed"], ["y"]),
        ],
    )


def layer_merge() -> onnx.FunctionProto:
    """Levels joined on channels: normed each by itself, scaled, then one product for all."""
    return function(
        "LayerMerge",
        ["x", "norm_weight", "norm_bias", "scale", "weight", "bias"],
        ["y"],
        ["levels", "hidden_size", "epsilon"],
        [
            *shape("split", 0, 0, "@levels", "@hidden_size"),
            node("Reshape", ["x", "split"], ["levels_apart"], allowzero=0),
            *shape("channels", "@hidden_size"),
            node("Constant", [], ["one"], value_float=1.0),
            node("CastLike", ["one", "x"], ["one_like"]),
            node("Expand", ["one_like", "channels"], ["unit"]),
            node(
                "LayerNormalization",
                ["levels_apart", "unit"],
                ["normed"],
                axis=-1,
                stash_type=1,
                epsilon="@epsilon:FLOAT",
            ),
            ints("last", -1),
            node("Unsqueeze", ["scale", "last"], ["column"]),
            node("Mul", ["norm_weight", "column"], ["gain"]),
            node("Mul", ["norm_bias", "column"], ["shift"]),
            node("Mul", ["normed", "gain"], ["gained"]),
            node("Add", ["gained", "shift"], ["ready"]),
            ints("flat", 0, 0, -1),
            node("Reshape", ["ready", "flat"], ["joined"], allowzero=0),
            node("MatMul", ["joined", "weight"], ["product"]),
            node("Mul", ["bias", "column"], ["offsets"]),
            ints("first", 0),
            node("ReduceSum", ["offsets", "first"], ["offset"], keepdims=0),
            node("Add", ["product", "offset"], ["y"]),
        ],
    )


def response_norm() -> onnx.FunctionProto:
    """Global response normalization over an image [B, H, W, C], norms in float32."""
    return function(
        "ResponseNorm",
        ["x", "weight"],
        ["y"],
        ["epsilon"],
        [
            node("Cast", ["x"], ["f32"], to=onnx.TensorProto.FLOAT),
            ints("plane", 1, 2),
            node("ReduceL2", ["f32", "plane"], ["norms"], keepdims=1),
            ints("channels", -1),
            node("ReduceMean", ["norms", "channels"], ["mean"], keepdims=1),
            node("Constant", [], ["epsilon_float"], value_float="@epsilon:FLOAT"),
            node("Add", ["mean", "epsilon_float"], ["floor"]),
            node("Div", ["norms", "floor"], ["ratios_f32"]),
            node("CastLike", ["ratios_f32", "x"], ["ratios"]),
            node("Mul", ["weight", "ratios"], ["extra"]),
            node("Constant", [], ["one_float"], value_float=1.0),
            node("CastLike", ["one_float", "x"], ["one"]),
            node("Add", ["extra", "one"], ["gain"]),
            node("Mul", ["x", "gain"], ["y"]),
        ],
    )


FUNCTIONS = {
    f.name: f
    for f in (
        quick_gelu(),
        swiglu(),
        unembed(),
        blocked_linear(),
        blocked_embed(),
        row_quantize(),
        row_quantized_linear(),
        cached_attention(),
        rotary_attention(),
        relative_attention(),
        ms_deform_attn(),
        layer_merge(),
        response_norm(),
    )
}
