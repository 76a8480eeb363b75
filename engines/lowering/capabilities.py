"""What each target does with each op: kept as it is, swapped for the target's own, decomposed.

A table, read by lower.py. An op without a row is not supported there, and the build says so by
name instead of finding out on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from edgevlm.engines.lowering import rewrites
from edgevlm.toolkit.target import Target, Version

if TYPE_CHECKING:
    import onnx

    from edgevlm.engines.lowering.graph import Rewriter

Action = Literal["keep", "swap", "decompose"]
Rewrite = Callable[["onnx.NodeProto", "Rewriter"], "list[onnx.NodeProto]"]


@dataclass(frozen=True)
class Row:
    """One op on one target.

    since: the first backend version for which the row holds. fits: whether the row suits a call
    (None: every call); where it does not, `otherwise` is tried. Decomposing keeps our function's
    standard body.
    """

    action: Action
    why: str
    rewrite: Rewrite | None = None
    into: str = ""
    since: Version = ()
    fits: Callable[[onnx.NodeProto], bool] | None = None
    otherwise: Row | None = None

    def choose(self, node: onnx.NodeProto) -> Row | None:
        """The row that suits this call, None if no alternative does."""
        if self.fits is None or self.fits(node):
            return self
        return self.otherwise.choose(node) if self.otherwise else None

    def alternatives(self) -> Iterator[Row]:
        """This row and all that are tried where it does not fit."""
        yield self
        if self.otherwise:
            yield from self.otherwise.alternatives()


_STANDARD = (
    "Add And Attention Cast CastLike Clip Concat Constant Conv Cos DequantizeLinear Div Expand "
    "Gather GatherND Gelu Greater GreaterOrEqual GridSample Identity LayerNormalization "
    "LessOrEqual MatMul Max Mul QuantizeLinear RMSNormalization Range ReduceL2 ReduceMax "
    "ReduceMean ReduceSum Relu Reshape RotaryEmbedding Shape Sigmoid Sin Slice Softmax Split Sqrt "
    "Squeeze Sub Swish Tanh TensorScatter Transpose Unsqueeze Where"
).split()


def _rewrite(rewrite: Rewrite, into: str, why: str) -> Row:
    return Row("swap", why, rewrite, into)


_KEEP = {op: Row("keep", "a standard op with a kernel") for op in _STANDARD}

_DECOMPOSE = Row("decompose", "no kernel of its own; the standard body runs")

_ROTARY_FIRST = Row(
    "swap",
    "as above; the kernel rotates heads of 16n channels only, so RotaryEmbedding comes first",
    rewrites.rotary_then_group_query_attention,
    "com.microsoft.GroupQueryAttention",
    fits=rewrites.heads_of(8),
    otherwise=Row("decompose", "the kernel takes heads of 8n channels only"),
)
_CACHED_ATTENTION = Row(
    "swap",
    "writes the cache in place; no mask, no copy per token",
    rewrites.group_query_attention,
    "com.microsoft.GroupQueryAttention",
    fits=rewrites.heads_of(16),
    otherwise=_ROTARY_FIRST,
)

_ATTENTION = Row(
    "swap",
    "scores in tiles that stay in the cache, never all at once",
    rewrites.multi_head_attention,
    "com.microsoft.MultiHeadAttention",
    fits=rewrites.plain_attention,
    otherwise=_KEEP["Attention"],
)

ONNXRUNTIME_CPU: Mapping[str, Row] = {
    **_KEEP,
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
        "reads the embedding table without turning it",
    ),
    "edgevlm.BlockedLinear": _rewrite(
        rewrites.blocked_linear,
        "com.microsoft.MatMulNBits",
        "multiplies by the stored bytes; its input is rounded to 8 bits",
    ),
    "edgevlm.BlockedEmbed": _DECOMPOSE,
    "edgevlm.CachedAttention": _CACHED_ATTENTION,
    "edgevlm.RotaryAttention": _rewrite(
        rewrites.rotary_attention,
        "com.microsoft.MultiHeadAttention",
        "turned as they lie, scores in tiles: no transposes, never all scores at once",
    ),
    "edgevlm.MSDeformAttn": _DECOMPOSE,
    "edgevlm.LayerMerge": _DECOMPOSE,
    "edgevlm.ResponseNorm": _DECOMPOSE,
}

# ONNX Runtime 1.23, the last release for Python 3.10: opset 23, and a window that it gets wrong.
_NEW_IN_1_24 = ("DequantizeLinear", "QuantizeLinear", "Swish", "TensorScatter")
_NO_WINDOW = replace(
    _CACHED_ATTENTION,
    fits=lambda node: rewrites.heads_of(16)(node) and not rewrites.windowed(node),
    otherwise=replace(
        _ROTARY_FIRST,
        fits=lambda node: rewrites.heads_of(8)(node) and not rewrites.windowed(node),
        otherwise=None,
    ),
)
ONNXRUNTIME_1_23_CPU: Mapping[str, Row] = {
    op: row for op, row in ONNXRUNTIME_CPU.items() if op not in _NEW_IN_1_24
} | {"edgevlm.CachedAttention": _NO_WINDOW}

TABLES: dict[str, Mapping[str, Row]] = {"onnxruntime": ONNXRUNTIME_CPU}


def reads_opset_23_only(target: Target) -> bool:
    """Whether the target is an ONNX Runtime before 1.24."""
    return target.backend == "onnxruntime" and () < target.version < (1, 24)


def rows(target: Target) -> Mapping[str, Row]:
    """The table of a target; empty where no lowering has been written for its backend."""
    if reads_opset_23_only(target):
        return ONNXRUNTIME_1_23_CPU
    return TABLES.get(target.backend, {})
