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


def cached_attention() -> onnx.FunctionProto:
    """Rotary attention over a cache of static length, written in place at positions[:, 0].

    head_split and kv_split are the Reshape targets [0, 0, heads, -1] of q and of k, v. window
    (-1: none) is already in the mask; kernels that mask by themselves need the number.
    """

    def heads(source: str, split: str) -> list[onnx.NodeProto]:
        return [
            _node("Constant", [], [f"{source}_split"], value_ints=f"@{split}:INTS"),
            _node("Reshape", [source, f"{source}_split"], [f"{source}_bshd"], allowzero=0),
            _node("Transpose", [f"{source}_bshd"], [f"{source}_bhsd"], perm=[0, 2, 1, 3]),
        ]

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
            *heads("q", "head_split"),
            *heads("k", "kv_split"),
            *heads("v", "kv_split"),
            turned("q"),
            turned("k"),
            _ints("first", 0),
            _ints("second", 1),
            _node("Slice", ["positions", "first", "second", "second"], ["start_column"]),
            _node("Squeeze", ["start_column", "second"], ["start"]),
            written("past_key", "k_turned", "present_key"),
            written("past_value", "v_bhsd", "present_value"),
            _node(
                "Attention",
                ["q_turned", "present_key", "present_value", "mask"],
                ["mixed"],
                scale="@scale:FLOAT",
                is_causal=0,
                softcap=0.0,
                qk_matmul_output_mode=0,
            ),
            _node("Transpose", ["mixed"], ["mixed_bshd"], perm=[0, 2, 1, 3]),
            _ints("flat", 0, 0, -1),
            _node("Reshape", ["mixed_bshd", "flat"], ["y"], allowzero=0),
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
    )
}
