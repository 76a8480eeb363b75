"""TensorRT's rows, for TensorRT 10.3 to 11.4 and TensorRT-RTX: what its parser takes since when.

Releases are those of TensorRT; capabilities.py says which of them an RTX release equals. Attention,
RotaryEmbedding, RMSNormalization and TensorScatter came with 10.14 and 10.15: JetPack 6 (10.3) and
7.0 (10.13) get simpler ops. Weights in codes become symmetric INT8 or INT4, the only ones that it
takes: a backend changes their bytes.
"""

from __future__ import annotations

import onnx

from edgevlm.engines.lowering import tensorrt_older as older
from edgevlm.engines.lowering import tensorrt_rewrites as rewrites
from edgevlm.engines.lowering.capabilities import Rewrite, Row
from edgevlm.engines.lowering.graph import attribute

_STANDARD = (
    "Abs Add And Cast CastLike Clip Concat Conv Cos DequantizeLinear Div Equal Expand Gather "
    "GatherND Gelu Greater GreaterOrEqual GridSample Identity LayerNormalization LessOrEqual "
    "MatMul Max Mul Neg QuantizeLinear Range ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum "
    "Relu Reshape Round Shape Sigmoid Sin Slice Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze "
    "Where"
).split()
_ATTENTION_SINCE = (10, 14)
_CACHE_SINCE = (10, 15)  # RotaryEmbedding, RMSNormalization, TensorScatter
_SWISH_SINCE = (11,)

_KEEP = {op: Row("keep", "a standard op that the parser takes") for op in _STANDARD}
_BODY = Row("decompose", "the builder fuses the standard body")


def _swap(rewrite: Rewrite, into: str, why: str) -> Row:
    return Row("swap", why, rewrite, into)


def _since(version: tuple[int, ...], row: Row, before: Row | None = None) -> Row:
    return Row(row.action, row.why, row.rewrite, row.into, version, row.fits, before)


def _in_codes(node: onnx.NodeProto) -> bool:
    """Whether the builder multiplies by a blocked weight as it is stored."""
    if int(attribute(node, "zero_points")):
        return False
    scores = node.name.endswith(("/unembed", "/head"))
    return int(attribute(node, "bits")) == 4 or scores


def _to_channels_first(node: onnx.NodeProto) -> bool:
    """Whether a Transpose makes [B, C, H, W] of [B, H, W, C]."""
    return [n for a in node.attribute if a.name == "perm" for n in a.ints] == [0, 3, 1, 2]


_BLOCKED = Row(
    "swap",
    "weights stay in codes: 4 bits in symmetric blocks, and 8 bits of the output layer",
    rewrites.blocked_linear,
    "DequantizeLinear",
    fits=_in_codes,
    otherwise=Row(
        "swap",
        "weights become floats: there is no kernel for 8-bit blocks, nor for zero points",
        rewrites.blocked_linear_in_floats,
        "MatMul",
    ),
)

ROWS: dict[str, Row] = {
    **_KEEP,
    "Softmax": _swap(rewrites.softmax, "Softmax", "of two axes at least: the parser refuses one"),
    "Transpose": Row(
        "swap",
        "what is added behind a convolution reads its input too: the builder writes it once",
        rewrites.to_channels_first,
        "Transpose",
        fits=_to_channels_first,
        otherwise=_KEEP["Transpose"],
    ),
    "Swish": _since(
        _SWISH_SINCE,
        Row("keep", "a standard op that the parser takes"),
        _swap(rewrites.swish, "Sigmoid", "the builder makes the same kernel of Sigmoid and Mul"),
    ),
    "RMSNormalization": _since(
        _CACHE_SINCE,
        Row("keep", "a kernel of its own"),
        _swap(
            older.rms_norm, "ReduceMean", "before 10.15: in simpler ops, which the builder joins"
        ),
    ),
    "Attention": _since(
        _ATTENTION_SINCE,
        _swap(rewrites.attention, "Attention", "with heads on an axis of their own: fused kernels"),
        _swap(older.attention, "MatMul", "before 10.14: two products and a Softmax"),
    ),
    "RotaryEmbedding": _since(_CACHE_SINCE, Row("keep", "a standard op that the parser takes")),
    "TensorScatter": _since(_CACHE_SINCE, Row("keep", "writes the cache in place")),
    "edgevlm.CachedAttention": _since(
        _CACHE_SINCE,
        Row("decompose", "RotaryEmbedding, TensorScatter and Attention, which the builder fuses"),
        _swap(older.cached_attention, "MatMul", "before 10.15: simpler ops; the cache is copied"),
    ),
    "edgevlm.RotaryAttention": _since(
        _ATTENTION_SINCE,
        _BODY,
        _swap(older.rotary_attention, "MatMul", "before 10.14: two products and a Softmax"),
    ),
    "edgevlm.RelativeAttention": _since(
        _ATTENTION_SINCE,
        _swap(
            rewrites.relative_attention,
            "Attention",
            "biases as channels of q and k; v is made as wide, as the parser wants it",
        ),
        _BODY,
    ),
    "edgevlm.BlockedLinear": _BLOCKED,
    "edgevlm.BlockedEmbed": _swap(
        rewrites.blocked_embed, "DequantizeLinear", "one kernel reads the asked rows in 8 bits"
    ),
    "edgevlm.RowQuantize": _swap(
        rewrites.row_quantize, "", "inputs stay in float: there is no scale for each row"
    ),
    "edgevlm.RowQuantizedLinear": _swap(
        rewrites.row_quantized_linear,
        "DequantizeLinear",
        "weights in 8 bits with a scale per output, which the builder fuses with the product",
    ),
    "edgevlm.QuickGelu": _BODY,
    "edgevlm.SwiGLU": _BODY,
    "edgevlm.Unembed": _BODY,
    "edgevlm.MSDeformAttn": _swap(
        rewrites.ms_deform_attn,
        "GridSample",
        "the body with points before queries: one level is two kernels in place of six",
    ),
    "edgevlm.LayerMerge": _BODY,
    "edgevlm.ResponseNorm": _BODY,
}
