"""Functions for attention: with a KV cache (language models), with rotated patches (MLCD)."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from edgevlm.export.nodes import function, ints, node, shape


def _heads(source: str, num_heads: str) -> list[onnx.NodeProto]:
    """[B, S, heads * d] -> [B, heads, S, d]."""
    return [
        *shape(f"{source}_split", 0, 0, num_heads, "@head_dim"),
        node("Reshape", [source, f"{source}_split"], [f"{source}_bshd"], allowzero=0),
        node("Transpose", [f"{source}_bshd"], [f"{source}_bhsd"], perm=[0, 2, 1, 3]),
    ]


def _float32(source: str) -> onnx.NodeProto:
    """`source` in float32, as SOURCE_f32."""
    return node("Cast", [source], [f"{source}_f32"], to=onnx.TensorProto.FLOAT)


def _attended(inputs: Sequence[str], **scale: str) -> list[onnx.NodeProto]:
    """Attention on [B, heads, S, d] and back to [B, S, heads * d] as "y"."""
    return [
        node(
            "Attention",
            inputs,
            ["mixed"],
            is_causal=0,
            softcap=0.0,
            qk_matmul_output_mode=0,
            **scale,
        ),
        node("Transpose", ["mixed"], ["mixed_bshd"], perm=[0, 2, 1, 3]),
        ints("flat", 0, 0, -1),
        node("Reshape", ["mixed_bshd", "flat"], ["y"], allowzero=0),
    ]


def cached_attention() -> onnx.FunctionProto:
    """Rotary attention over a cache of static length, written in place at positions[:, 0].

    cos and sin are float32, and so is the rotation. window (-1: none) is already in the mask;
    kernels that mask by themselves need the number.
    """

    def rotated(source: str) -> list[onnx.NodeProto]:
        """SOURCE_bhsd [B, heads, S, d] turned by the angles at `positions` [B, S], half against
        half (Su et al., arXiv 2104.09864, in the layout of GPT-NeoX), as SOURCE_rotated.
        """
        f32 = f"{source}_bhsd_f32"
        return [
            _float32(f"{source}_bhsd"),
            node(
                "RotaryEmbedding",
                [f32, "cos", "sin", "positions"],
                [f"{f32}_rotated"],
                interleaved=0,
                rotary_embedding_dim=0,
                num_heads=0,
            ),
            node("CastLike", [f"{f32}_rotated", source], [f"{source}_rotated"]),
        ]

    def written(past: str, update: str, present: str) -> onnx.NodeProto:
        """past [B, kv_heads, context, d] with update [B, kv_heads, S, d] from row start[b] on."""
        return node("TensorScatter", [past, update, "start"], [present], axis=2, mode="linear")

    return function(
        "CachedAttention",
        ["q", "k", "v", "past_key", "past_value", "cos", "sin", "positions", "mask"],
        ["y", "present_key", "present_value"],
        ["num_heads", "num_kv_heads", "head_dim", "scale", "window"],
        [
            *_heads("q", "@num_heads"),
            *_heads("k", "@num_kv_heads"),
            *_heads("v", "@num_kv_heads"),
            *rotated("q"),
            *rotated("k"),
            ints("first", 0),
            ints("second", 1),
            node("Slice", ["positions", "first", "second", "second"], ["start_column"]),
            node("Squeeze", ["start_column", "second"], ["start"]),
            written("past_key", "k_rotated", "present_key"),
            written("past_value", "v_bhsd", "present_value"),
            *_attended(["q_rotated", "present_key", "present_value", "mask"], scale="@scale:FLOAT"),
        ],
    )


def rotary_attention() -> onnx.FunctionProto:
    """Unmasked attention, q and k rotated in float32 by float32 angles [S, d / 2]."""

    def rotated(source: str) -> list[onnx.NodeProto]:
        """SOURCE [B, S, heads * d] by heads, [B, heads, S, d], turned by cos and sin [S, d / 2],
        half against half, as SOURCE_rotated in the format of SOURCE.
        """
        a, b = f"{source}_first", f"{source}_second"
        return [
            *_heads(source, "@num_heads"),
            _float32(f"{source}_bhsd"),
            node("Split", [f"{source}_bhsd_f32"], [a, b], axis=-1, num_outputs=2),
            node("Mul", [a, "cos"], [f"{a}_cos"]),
            node("Mul", [b, "sin"], [f"{b}_sin"]),
            node("Mul", [b, "cos"], [f"{b}_cos"]),
            node("Mul", [a, "sin"], [f"{a}_sin"]),
            node("Sub", [f"{a}_cos", f"{b}_sin"], [f"{source}_left"]),
            node("Add", [f"{b}_cos", f"{a}_sin"], [f"{source}_right"]),
            node("Concat", [f"{source}_left", f"{source}_right"], [f"{source}_float"], axis=-1),
            node("CastLike", [f"{source}_float", source], [f"{source}_rotated"]),
        ]

    return function(
        "RotaryAttention",
        ["q", "k", "v", "angles"],
        ["y"],
        ["num_heads", "head_dim"],
        [
            node("Cos", ["angles"], ["cos"]),
            node("Sin", ["angles"], ["sin"]),
            *rotated("q"),
            *rotated("k"),
            *_heads("v", "@num_heads"),
            *_attended(["q_rotated", "k_rotated", "v_bhsd"]),
        ],
    )
