"""Ops that deserve a fused kernel, as ONNX functions of domain "edgevlm" with standard bodies.

Any runtime can run the body; a target that has a kernel swaps the call (engines/lower.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import helper

DOMAIN = "edgevlm"
VERSION = 1
OPSET = 24
IR_VERSION = 11


def _node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attrs: Any) -> onnx.NodeProto:
    """A node; an attribute given as "@name" refers to the function's own attribute."""
    own = {key: value for key, value in attrs.items() if not _refers(value)}
    node = helper.make_node(kind, list(inputs), list(outputs), **own)
    for key, value in attrs.items():
        if _refers(value):
            name, kind_of = value[1:].split(":")
            proto = onnx.AttributeProto(name=key, ref_attr_name=name)
            proto.type = onnx.AttributeProto.AttributeType.Value(kind_of)
            node.attribute.append(proto)
    return node


def _refers(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("@")


def _ints(name: str, *values: int) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value_ints=list(values))


def _function(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    attributes: Sequence[str],
    nodes: Sequence[onnx.NodeProto],
) -> onnx.FunctionProto:
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_function(
        DOMAIN, name, list(inputs), list(outputs), list(nodes), opset, list(attributes)
    )


def add_rms_norm() -> onnx.FunctionProto:
    """(rms_norm(x + residual), x + residual)."""
    return _function(
        "AddRMSNorm",
        ["x", "residual", "weight"],
        ["normed", "total"],
        ["epsilon"],
        [
            _node("Add", ["x", "residual"], ["total"]),
            _node(
                "RMSNormalization",
                ["total", "weight"],
                ["normed"],
                axis=-1,
                stash_type=1,
                epsilon="@epsilon:FLOAT",
            ),
        ],
    )


def add_layer_norm() -> onnx.FunctionProto:
    """(layer_norm(x + residual), x + residual)."""
    return _function(
        "AddLayerNorm",
        ["x", "residual", "weight", "bias"],
        ["normed", "total"],
        ["epsilon"],
        [
            _node("Add", ["x", "residual"], ["total"]),
            _node(
                "LayerNormalization",
                ["total", "weight", "bias"],
                ["normed"],
                axis=-1,
                stash_type=1,
                epsilon="@epsilon:FLOAT",
            ),
        ],
    )


def quick_gelu() -> onnx.FunctionProto:
    """x * sigmoid(alpha x)."""
    return _function(
        "QuickGelu",
        ["x"],
        ["y"],
        ["alpha"],
        [
            _node("Constant", [], ["alpha_float"], value_float="@alpha:FLOAT"),
            _node("CastLike", ["alpha_float", "x"], ["factor"]),
            _node("Mul", ["x", "factor"], ["scaled"]),
            _node("Sigmoid", ["scaled"], ["gate"]),
            _node("Mul", ["x", "gate"], ["y"]),
        ],
    )


def swiglu() -> onnx.FunctionProto:
    """silu(gate) * up."""
    return _function(
        "SwiGLU",
        ["gate", "up"],
        ["y"],
        [],
        [
            _node("Swish", ["gate"], ["active"], alpha=1.0),
            _node("Mul", ["active", "up"], ["y"]),
        ],
    )


def unembed() -> onnx.FunctionProto:
    """x @ weight^T, the embedding table used as the output layer."""
    return _function(
        "Unembed",
        ["x", "weight"],
        ["y"],
        [],
        [
            _node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
            _node("MatMul", ["x", "turned"], ["y"]),
        ],
    )


def _heads(source: str, split: str) -> list[onnx.NodeProto]:
    """[B, S, heads * d] -> [B, heads, S, d]; the attribute `split` is the Reshape target."""
    return [
        _node("Constant", [], [f"{source}_split"], value_ints=f"@{split}:INTS"),
        _node("Reshape", [source, f"{source}_split"], [f"{source}_bshd"], allowzero=0),
        _node("Transpose", [f"{source}_bshd"], [f"{source}_bhsd"], perm=[0, 2, 1, 3]),
    ]


def _attended(inputs: Sequence[str], **scale: str) -> list[onnx.NodeProto]:
    """Attention on [B, heads, S, d] and back to [B, S, heads * d] as "y"."""
    return [
        _node(
            "Attention",
            inputs,
            ["mixed"],
            is_causal=0,
            softcap=0.0,
            qk_matmul_output_mode=0,
            **scale,
        ),
        _node("Transpose", ["mixed"], ["mixed_bshd"], perm=[0, 2, 1, 3]),
        _ints("flat", 0, 0, -1),
        _node("Reshape", ["mixed_bshd", "flat"], ["y"], allowzero=0),
    ]


def cached_attention() -> onnx.FunctionProto:
    """Rotary attention over a cache of static length, written in place at positions[:, 0].

    head_split and kv_split are the Reshape targets [0, 0, heads, -1] of q and of k, v. window
    (-1: none) is already in the mask; kernels that mask by themselves need the number.
    """

    def turned(source: str) -> onnx.NodeProto:
        return _node(
            "RotaryEmbedding",
            [f"{source}_bhsd", "cos", "sin", "positions"],
            [f"{source}_turned"],
            interleaved=0,
            rotary_embedding_dim=0,
            num_heads=0,
        )

    def written(past: str, update: str, present: str) -> onnx.NodeProto:
        return _node("TensorScatter", [past, update, "start"], [present], axis=2, mode="linear")

    return _function(
        "CachedAttention",
        ["q", "k", "v", "past_key", "past_value", "cos", "sin", "positions", "mask"],
        ["y", "present_key", "present_value"],
        ["head_split", "kv_split", "scale", "window"],
        [
            *_heads("q", "head_split"),
            *_heads("k", "kv_split"),
            *_heads("v", "kv_split"),
            turned("q"),
            turned("k"),
            _ints("first", 0),
            _ints("second", 1),
            _node("Slice", ["positions", "first", "second", "second"], ["start_column"]),
            _node("Squeeze", ["start_column", "second"], ["start"]),
            written("past_key", "k_turned", "present_key"),
            written("past_value", "v_bhsd", "present_value"),
            *_attended(["q_turned", "present_key", "present_value", "mask"], scale="@scale:FLOAT"),
        ],
    )


def rotary_attention() -> onnx.FunctionProto:
    """Unmasked attention, q and k turned by a table of angles [S, d / 2] in float32."""

    def turned(source: str) -> list[onnx.NodeProto]:
        wide, a, b = f"{source}_wide", f"{source}_first", f"{source}_second"
        return [
            *_heads(source, "head_split"),
            _node("Cast", [f"{source}_bhsd"], [wide], to=onnx.TensorProto.FLOAT),
            _node("Split", [wide], [a, b], axis=-1, num_outputs=2),
            _node("Mul", [a, "cos"], [f"{a}_cos"]),
            _node("Mul", [b, "sin"], [f"{b}_sin"]),
            _node("Mul", [b, "cos"], [f"{b}_cos"]),
            _node("Mul", [a, "sin"], [f"{a}_sin"]),
            _node("Sub", [f"{a}_cos", f"{b}_sin"], [f"{source}_left"]),
            _node("Add", [f"{b}_cos", f"{a}_sin"], [f"{source}_right"]),
            _node("Concat", [f"{source}_left", f"{source}_right"], [f"{source}_float"], axis=-1),
            _node("CastLike", [f"{source}_float", source], [f"{source}_turned"]),
        ]

    return _function(
        "RotaryAttention",
        ["q", "k", "v", "angles"],
        ["y"],
        ["head_split"],
        [
            _node("Cast", ["angles"], ["angles_float"], to=onnx.TensorProto.FLOAT),
            _node("Cos", ["angles_float"], ["cos"]),
            _node("Sin", ["angles_float"], ["sin"]),
            *turned("q"),
            *turned("k"),
            *_heads("v", "head_split"),
            *_attended(["q_turned", "k_turned", "v_bhsd"]),
        ],
    )


def ms_deform_attn() -> onnx.FunctionProto:
    """Deformable attention over levels of one size, all sampled by one GridSample.

    step and centre turn offsets into GridSample's coordinates: offset * step + centre. The
    attributes are Reshape targets: levels [0, L, h, w, M, d], picture [-1, d, h, w], shifts
    [0, 0, M, L, P, 2], grid [-1, Q, P, 2], joint [0, 0, M, L * P], shares [0, 0, M, L, P], share
    [-1, 1, Q, P], heads [-1, M, L, d, Q].
    """

    def reshaped(source: str, to: str) -> list[onnx.NodeProto]:
        return [
            _node("Constant", [], [f"{to}_shape"], value_ints=f"@{to}:INTS"),
            _node("Reshape", [source, f"{to}_shape"], [f"{to}_view"], allowzero=0),
        ]

    def wide(source: str) -> onnx.NodeProto:
        return _node("Cast", [source], [f"{source}_wide"], to=onnx.TensorProto.FLOAT)

    def turned(source: str, perm: list[int]) -> onnx.NodeProto:
        return _node("Transpose", [source], [f"{source}_turned"], perm=perm)

    return _function(
        "MSDeformAttn",
        ["value", "offsets", "scores", "step", "centre"],
        ["y"],
        ["levels", "picture", "shifts", "grid", "joint", "shares", "share", "heads"],
        [
            wide("value"),
            wide("offsets"),
            wide("scores"),
            *reshaped("value_wide", "levels"),
            turned("levels_view", [0, 4, 1, 5, 2, 3]),
            *reshaped("levels_view_turned", "picture"),
            *reshaped("offsets_wide", "shifts"),
            _node("Mul", ["shifts_view", "step"], ["scaled"]),
            _node("Add", ["scaled", "centre"], ["places"]),
            turned("places", [0, 2, 3, 1, 4, 5]),
            *reshaped("places_turned", "grid"),
            _node(
                "GridSample",
                ["picture_view", "grid_view"],
                ["sampled"],
                mode="linear",
                padding_mode="zeros",
                align_corners=0,
            ),
            *reshaped("scores_wide", "joint"),
            _node("Softmax", ["joint_view"], ["softmaxed"], axis=-1),
            *reshaped("softmaxed", "shares"),
            turned("shares_view", [0, 2, 3, 1, 4]),
            *reshaped("shares_view_turned", "share"),
            _node("Mul", ["sampled", "share_view"], ["weighted"]),
            _ints("point_axis", 3),
            _node("ReduceSum", ["weighted", "point_axis"], ["points_sum"], keepdims=0),
            *reshaped("points_sum", "heads"),
            _ints("level_axis", 2),
            _node("ReduceSum", ["heads_view", "level_axis"], ["levels_sum"], keepdims=0),
            turned("levels_sum", [0, 3, 1, 2]),
            _ints("flat", 0, 0, -1),
            _node("Reshape", ["levels_sum_turned", "flat"], ["joined"], allowzero=0),
            _node("CastLike", ["joined", "value"], ["y"]),
        ],
    )


def layer_merge() -> onnx.FunctionProto:
    """Levels joined on channels: normed each by itself, scaled, then one product for all.

    split: [0, 0, levels, D]; unit: ones [D].
    """
    return _function(
        "LayerMerge",
        ["x", "unit", "norm_weight", "norm_bias", "scale", "weight", "bias"],
        ["y"],
        ["split", "epsilon"],
        [
            _node("Constant", [], ["split_shape"], value_ints="@split:INTS"),
            _node("Reshape", ["x", "split_shape"], ["levels"], allowzero=0),
            _node(
                "LayerNormalization",
                ["levels", "unit"],
                ["normed"],
                axis=-1,
                stash_type=1,
                epsilon="@epsilon:FLOAT",
            ),
            _ints("last", -1),
            _node("Unsqueeze", ["scale", "last"], ["column"]),
            _node("Mul", ["norm_weight", "column"], ["gain"]),
            _node("Mul", ["norm_bias", "column"], ["shift"]),
            _node("Mul", ["normed", "gain"], ["gained"]),
            _node("Add", ["gained", "shift"], ["ready"]),
            _ints("flat", 0, 0, -1),
            _node("Reshape", ["ready", "flat"], ["joined"], allowzero=0),
            _node("MatMul", ["joined", "weight"], ["product"]),
            _node("Mul", ["bias", "column"], ["offsets"]),
            _ints("first", 0),
            _node("ReduceSum", ["offsets", "first"], ["offset"], keepdims=0),
            _node("Add", ["product", "offset"], ["y"]),
        ],
    )


def response_norm() -> onnx.FunctionProto:
    """Global response normalization over a picture [B, H, W, C], norms in float32."""
    return _function(
        "ResponseNorm",
        ["x", "weight"],
        ["y"],
        ["epsilon"],
        [
            _node("Cast", ["x"], ["wide"], to=onnx.TensorProto.FLOAT),
            _ints("plane", 1, 2),
            _node("ReduceL2", ["wide", "plane"], ["norms"], keepdims=1),
            _ints("channels", -1),
            _node("ReduceMean", ["norms", "channels"], ["mean"], keepdims=1),
            _node("Constant", [], ["epsilon_float"], value_float="@epsilon:FLOAT"),
            _node("Add", ["mean", "epsilon_float"], ["floor"]),
            _node("Div", ["norms", "floor"], ["ratios_wide"]),
            _node("CastLike", ["ratios_wide", "x"], ["ratios"]),
            _node("Mul", ["weight", "ratios"], ["extra"]),
            _node("Constant", [], ["one_float"], value_float=1.0),
            _node("CastLike", ["one_float", "x"], ["one"]),
            _node("Add", ["extra", "one"], ["gain"]),
            _node("Mul", ["x", "gain"], ["y"]),
        ],
    )


FUNCTIONS = {
    f.name: f
    for f in (
        add_rms_norm(),
        add_layer_norm(),
        quick_gelu(),
        swiglu(),
        unembed(),
        cached_attention(),
        rotary_attention(),
        ms_deform_attn(),
        layer_merge(),
        response_norm(),
    )
}
