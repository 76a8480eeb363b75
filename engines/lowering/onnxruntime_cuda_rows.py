"""What ONNX Runtime does with each op on an NVIDIA card.

A kernel belongs to one version of an op, or to a range with an end: one that is newer in the
graph's opset than the newest kernel runs on the processor, between two copies, without a word.
KERNELS has the version of each, by the table of kernels of release 1.31; the graph's opset is 23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgevlm.engines.lowering import onnxruntime_cuda_rewrites as cuda
from edgevlm.engines.lowering import rewrites
from edgevlm.engines.lowering.capabilities import Rewrite, Row
from edgevlm.engines.lowering.onnxruntime_rows import ROWS as PROCESSOR

# The version of each standard op that has a kernel.
KERNELS: Mapping[str, int] = {
    "Abs": 13, "Add": 14, "And": 7, "Attention": 23, "Cast": 23, "Clip": 13, "Concat": 13,
    "Conv": 22, "Div": 14, "Expand": 13, "Gather": 13, "GatherND": 13, "Gelu": 20, "Greater": 13,
    "GreaterOrEqual": 16, "GridSample": 22, "LayerNormalization": 17, "LessOrEqual": 16,
    "MatMul": 13, "Max": 13, "Mul": 14, "Neg": 13, "RMSNormalization": 23, "Range": 11,
    "ReduceL2": 18, "ReduceMean": 18, "ReduceSum": 13, "Relu": 14, "Reshape": 23,
    "RotaryEmbedding": 23, "ScatterElements": 18, "Shape": 23, "Sigmoid": 13, "Slice": 13,
    "Softmax": 13, "Split": 18, "Sqrt": 13, "Squeeze": 23, "Sub": 14, "Tanh": 13, "TopK": 11,
    "Transpose": 23, "Unsqueeze": 23, "Where": 16,
}  # fmt: skip
# Without a kernel for their version, but gone before a graph runs: constants are computed when it
# is loaded, Identity is dropped, and CastLike is written as Cast.
GONE = ("CastLike", "Constant", "Cos", "Identity", "Sin")
# Formats that a kernel lacks, of those that models have.
LACKING: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("Clip", "Greater", "GreaterOrEqual", "LessOrEqual"), ("bf16",)),
    **dict.fromkeys(("ReduceL2", "ReduceMean", "TopK"), ("bf16",)),
    "GridSample": ("fp16", "bf16"),
}

_HALF = ("fp16", "bf16")
_DECOMPOSE = Row("decompose", "no kernel of its own; the standard body runs")
_RELATIVE = Row("decompose", "biases become channels of q and k, so that Attention stays plain")
_STATIC = Row(
    "refuse",
    "it has no products of inputs in INT8 or FP8, so rounding them would only take time; build the "
    "float bundle with --precision int8 or int4, or this one for TensorRT",
)


def _rewrite(rewrite: Rewrite, into: str, why: str) -> Row:
    return Row("swap", why, rewrite, into)


def _kept(op: str) -> Row:
    """A standard op; between casts in a model whose format its kernel lacks."""
    kept = Row("keep", "a standard op with a kernel" if op in KERNELS else "gone before it runs")
    if op not in ("Clip", "ReduceL2", "ReduceMean"):
        return kept
    formats = LACKING[op]
    between = _rewrite(cuda.in_float32, op, f"its kernel does not take {' or '.join(formats)}")
    return replace(between, formats=formats, otherwise=kept)


_SIMPLE = _rewrite(
    cuda.cached_attention,
    "ScatterElements",
    "the kernel takes fp16 and bf16, and heads of 8n channels; all scores in simple ops otherwise "
    "(--dtype fp16 is faster)",
)
_IN_PLACE = Row(
    "swap",
    "writes the cache in place; no mask, no copy per token",
    cuda.group_query_attention,
    "com.microsoft.GroupQueryAttention",
    fits=rewrites.heads_of(16),
    formats=_HALF,
    otherwise=Row(
        "swap",
        "as above; the kernel rotates heads of 16n channels only, so RotaryEmbedding comes first",
        cuda.rotary_then_group_query_attention,
        "com.microsoft.GroupQueryAttention",
        fits=rewrites.heads_of(8),
        formats=_HALF,
        otherwise=_SIMPLE,
    ),
)

# There is none for Add and the norm behind it: ONNX Runtime joins them itself, where the sum is
# read once, and the kernels for both at once were not measured on a card.
ROWS: dict[str, Row] = {
    **{op: _kept(op) for op in (*KERNELS, *GONE)},
    "QuantizeLinear": _STATIC,
    "DequantizeLinear": _STATIC,
    "ReduceMax": _rewrite(cuda.reduce_max, "TopK", "has no kernel of its newest version"),
    "Swish": _rewrite(cuda.swish, "com.microsoft.QuickGelu", "silu is QuickGelu with alpha 1"),
    "Attention": Row(
        "swap",
        "fused kernels; never all scores at once in fp16 and bf16",
        rewrites.multi_head_attention,
        "com.microsoft.MultiHeadAttention",
        fits=rewrites.plain_attention,
        otherwise=Row("keep", "a standard op with a kernel"),
    ),
    **{op: PROCESSOR[op] for op in ("edgevlm.QuickGelu", "edgevlm.SwiGLU", "edgevlm.Unembed")},
    "edgevlm.BlockedLinear": _rewrite(
        cuda.blocked_linear,
        "com.microsoft.MatMulNBits",
        "multiplies by the stored bytes; its input stays in the model's format",
    ),
    "edgevlm.BlockedEmbed": _DECOMPOSE,
    "edgevlm.RowQuantize": _rewrite(
        cuda.row_quantize, "", "inputs stay in float: there are no products of 8-bit integers"
    ),
    "edgevlm.RowQuantizedLinear": _rewrite(
        cuda.row_quantized_linear,
        "com.microsoft.MatMulNBits",
        "weights in 8 bits with a scale per output, which its blocks share",
    ),
    "edgevlm.CachedAttention": _IN_PLACE,
    "edgevlm.RotaryAttention": _rewrite(
        cuda.rotary_attention,
        "com.microsoft.MultiHeadAttention",
        "rotated as stored, then fused kernels: no transposes",
    ),
    "edgevlm.RelativeAttention": _RELATIVE,
    "edgevlm.MSDeformAttn": _DECOMPOSE,
    "edgevlm.LayerMerge": _DECOMPOSE,
    "edgevlm.ResponseNorm": _DECOMPOSE,
}
