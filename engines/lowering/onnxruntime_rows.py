"""What ONNX Runtime does with each op on a processor.

Release 1.23, the last for Python 3.10, reads opset 23 only and is wrong about windows of attention;
what holds from 1.24 on says so in `since`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from edgevlm.engines.lowering import rewrites
from edgevlm.engines.lowering.capabilities import Rewrite, Row

if TYPE_CHECKING:
    import onnx

_OPSET_24 = (1, 24)  # the first release that reads opset 24

_STANDARD = (
    "Abs Add And Attention Cast CastLike Clip Concat Constant Conv Cos DequantizeLinear Div "
    "Expand Gather GatherND Gelu Greater GreaterOrEqual GridSample Identity "
    "LayerNormalization LessOrEqual MatMul MatMulInteger Max Mul Neg QuantizeLinear "
    "RMSNormalization Range ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape "
    "RotaryEmbedding Round Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Swish Tanh "
    "TensorScatter Transpose Unsqueeze Where"
).split()


def _rewrite(rewrite: Rewrite, into: str, why: str) -> Row:
    return Row("swap", why, rewrite, into)


_NEW_TYPES = ("DequantizeLinear", "QuantizeLinear", "Swish", "TensorScatter")
_KEEP = {
    op: Row("keep", "a standard op with a kernel", since=_OPSET_24 if op in _NEW_TYPES else ())
    for op in _STANDARD
}

_DECOMPOSE = Row("decompose", "no kernel of its own; the standard body runs")

_RELATIVE = Row("decompose", "biases become channels of q and k, so that Attention stays plain")


def _heads_of(multiple: int, *, window: bool) -> Callable[[onnx.NodeProto], bool]:
    """Whether a call has heads of so many channels; window: whether it may have a window."""
    fits = rewrites.heads_of(multiple)
    return lambda node: fits(node) and (window or not rewrites.windowed(node))


_IN_PLACE = Row(
    "swap",
    "writes the cache in place; no mask, no copy per token",
    rewrites.group_query_attention,
    "com.microsoft.GroupQueryAttention",
)
_ROTARY_FIRST = Row(
    "swap",
    "as above; the kernel rotates heads of 16n channels only, so RotaryEmbedding comes first",
    rewrites.rotary_then_group_query_attention,
    "com.microsoft.GroupQueryAttention",
)
_BEFORE_1_24 = replace(
    _IN_PLACE,
    fits=_heads_of(16, window=False),
    otherwise=replace(_ROTARY_FIRST, fits=_heads_of(8, window=False)),
)
_DECOMPOSED = Row(
    "decompose",
    "the kernel takes heads of 8n channels only",
    since=_OPSET_24,
    otherwise=_BEFORE_1_24,
)
_CACHED_ATTENTION = replace(
    _IN_PLACE,
    since=_OPSET_24,
    fits=_heads_of(16, window=True),
    otherwise=replace(
        _ROTARY_FIRST,
        since=_OPSET_24,
        fits=_heads_of(8, window=True),
        otherwise=_DECOMPOSED,
    ),
)

_ATTENTION = Row(
    "swap",
    "scores in tiles that stay in the cache, never all at once",
    rewrites.multi_head_attention,
    "com.microsoft.MultiHeadAttention",
    fits=rewrites.plain_attention,
    otherwise=_KEEP["Attention"],
)

# No processor multiplies FP8, and ONNX Runtime has no such kernel: floats are multiplied.
_FP8_INPUT = Row(
    "keep",
    "rounds inputs to FP8 as a card would and multiplies floats: takes longer than float32",
    since=_OPSET_24,
    fits=rewrites.rounds_to_fp8,
)
_FP8_WEIGHT = Row(
    "swap",
    "FP8 weights are written as the floats that they stand for, four bytes each",
    rewrites.weight_in_floats,
    "Identity",
    since=_OPSET_24,
    fits=rewrites.weight_in_fp8,
    otherwise=replace(_FP8_INPUT, otherwise=_KEEP["DequantizeLinear"]),
)

ROWS: dict[str, Row] = {
    **_KEEP,
    "QuantizeLinear": replace(_FP8_INPUT, otherwise=_KEEP["QuantizeLinear"]),
    "DequantizeLinear": _FP8_WEIGHT,
    "Attention": _ATTENTION,
    "edgevlm.QuickGelu": _rewrite(
        rewrites.quick_gelu, "com.microsoft.QuickGelu", "one pass over memory"
    ),
    "edgevlm.SwiGLU": _rewrite(
        rewrites.swiglu, "com.microsoft.QuickGelu", "silu is QuickGelu with alpha 1"
    ),
    "edgevlm.Unembed": _rewrite(
        rewrites.unembed,
        "com.microsoft.FusedMatMul",
        "reads the embedding table as it is stored",
    ),
    "edgevlm.BlockedLinear": _rewrite(
        rewrites.blocked_linear,
        "com.microsoft.MatMulNBits",
        "multiplies by the stored bytes; its input is rounded to 8 bits",
    ),
    "edgevlm.BlockedEmbed": _DECOMPOSE,
    "edgevlm.RowQuantize": _rewrite(
        rewrites.row_quantize, "QuantizeLinear", "a scale for each row, one pass over memory"
    ),
    "edgevlm.RowQuantizedLinear": _rewrite(
        rewrites.row_quantized_linear,
        "com.microsoft.MatMulIntegerToFloat",
        "products of 8-bit integers, scaled while they are written",
    ),
    "edgevlm.CachedAttention": _CACHED_ATTENTION,
    "edgevlm.RotaryAttention": _rewrite(
        rewrites.rotary_attention,
        "com.microsoft.MultiHeadAttention",
        "rotated as stored, scores in tiles: no transposes, never all scores at once",
    ),
    "edgevlm.RelativeAttention": _RELATIVE,
    "edgevlm.MSDeformAttn": _DECOMPOSE,
    "edgevlm.LayerMerge": _DECOMPOSE,
    "edgevlm.ResponseNorm": _DECOMPOSE,
}
