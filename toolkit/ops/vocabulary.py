"""The vocabulary: every model of this project is a plain function over these ops.

NumPy runs them (toolkit/ops/numpy_ops.py), torch trains them (training/torch_ops.py), a recorder
writes them down as ONNX (export/record.py). Shapes in brackets: B batch, S sequence, C channels,
D width, H x W image; `...` any leading axes.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

import numpy as np

T = TypeVar("T")
R = TypeVar("R")
Array = np.ndarray[Any, np.dtype[Any]]
EightBits = Literal["int8", "fp8"]  # what fake_quant rounds to


def read_only(table: Array) -> Array:
    """The array, from now on refusing to be written: tables are shared between calls."""
    table.flags.writeable = False
    return table


@dataclass(frozen=True)
class Weights(Generic[T]):
    """A view of a component's parameters below one path: `w / "layers.0" / "attention.q"`.

    The path names the op in recorded graphs, precision plans and profiles; joined with a
    leaf ("weight", "bias") it is the tensor's key.
    """

    tensors: Mapping[str, T]
    steps: tuple[str, ...] = ()

    def __truediv__(self, step: str) -> Weights[T]:
        return replace(self, steps=(*self.steps, step))

    def __getitem__(self, leaf: str) -> T:
        return self.tensors[self.key(leaf)]

    def get(self, leaf: str) -> T | None:
        """The tensor, or None where the architecture has no such parameter (a missing bias)."""
        key = self.key(leaf)
        return self.tensors.get(key)

    def key(self, leaf: str) -> str:
        """The tensor's name on disk: layers.0.attention.q.weight."""
        return ".".join((*self.steps, leaf))

    def holding(self, **leaves: T) -> Weights[T]:
        """The same path with these tensors and no others."""
        return replace(self, tensors={self.key(leaf): x for leaf, x in leaves.items()})

    def replacing(self, **leaves: T) -> Weights[T]:
        """The same path with these tensors instead of its own."""
        replaced = {self.key(leaf): x for leaf, x in leaves.items()}
        return replace(self, tensors=ChainMap(replaced, cast(Any, self.tensors)))

    @property
    def path(self) -> str:
        """The name in graphs and plans: layers.0/attention.q."""
        return "/".join(self.steps)


@dataclass(frozen=True)
class Step(Generic[T]):
    """What every layer of a decoder uses in one call, made once by the model function.

    positions [B, S] int64: index of each token in its row of the cache;
    mask [B, 1, S, S_max] bool: which cache entries a token may see;
    cos, sin [context, head_dim / 2] float32: rotary tables, indexed by positions.
    """

    positions: T
    mask: T
    cos: T
    sin: T


class Ops(Protocol[T]):
    """The ops. An implementation is an interpreter; a wrapper is an implementation too."""

    # -- structure -------------------------------------------------------------------------

    def block(self, function: Callable[..., R], w: Weights[T], *args: Any) -> R:
        """function(op, w, *args): one layer of a model, with its parameters below `w`.

        The unit that torch recomputes (gradient checkpointing), shards or compiles; elsewhere a
        plain call. `op` is whoever runs the model, so a wrapper still sees the ops inside.
        """
        ...

    # -- with parameters -------------------------------------------------------------------

    def linear(self, x: T, w: Weights[T]) -> T:
        """x @ weight (+ bias). x [..., in], weight [in, out], bias [out] -> [..., out]."""
        ...

    def unembed(self, x: T, w: Weights[T]) -> T:
        """Logits from the embedding table itself: x [..., D], weight [V, D] -> [..., V]."""
        ...

    def embed(self, ids: T, w: Weights[T]) -> T:
        """Rows of the table: ids [B, S] int64, weight [V, D] -> [B, S, D]."""
        ...

    def conv(self, x: T, w: Weights[T], *, stride: int, padding: int = 0, groups: int = 1) -> T:
        """2-D convolution: x [B, C, H, W], weight [O, C / groups, k, k] -> [B, O, H', W']."""
        ...

    def layer_norm(self, x: T, w: Weights[T], eps: float) -> T:
        """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, in float32."""
        ...

    def rms_norm(self, x: T, w: Weights[T], eps: float) -> T:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32."""
        ...

    # -- elementwise -----------------------------------------------------------------------

    def add(self, a: T, b: T) -> T:
        """a + b with NumPy broadcasting."""
        ...

    def mul(self, a: T, b: T) -> T:
        """a * b with NumPy broadcasting."""
        ...

    def scale(self, x: T, factor: float) -> T:
        """x * factor, a number known from the configuration."""
        ...

    def gelu(self, x: T, *, tanh: bool = False) -> T:
        """x * Phi(x): exact (erf), or the tanh approximation."""
        ...

    def quick_gelu(self, x: T) -> T:
        """x * sigmoid(1.702 x), CLIP's activation."""
        ...

    def swiglu(self, gate: T, up: T) -> T:
        """silu(gate) * up."""
        ...

    def relu(self, x: T, *, limit: float | None = None) -> T:
        """max(x, 0), at most `limit` (6 for ReLU6)."""
        ...

    def sigmoid(self, x: T) -> T:
        """1 / (1 + exp(-x))."""
        ...

    def softmax(self, x: T) -> T:
        """exp(x) normalised to sum 1 over the last axis."""
        ...

    def mean(self, x: T, axes: tuple[int, ...]) -> T:
        """The mean over `axes`, which stay as axes of length 1."""
        ...

    def sum(self, x: T, axes: tuple[int, ...]) -> T:
        """The sum over `axes`, which stay as axes of length 1."""
        ...

    def response_norm(self, x: T, w: Weights[T], eps: float) -> T:
        """Global response normalization (ConvNeXt V2, arXiv 2301.00808), x [B, H, W, C].

        g = L2 norm of x over H and W; (weight * g / (mean of g over C + eps) + 1) * x.
        """
        ...

    # -- attention -------------------------------------------------------------------------

    def attention(self, q: T, k: T, v: T, *, num_heads: int) -> T:
        """Unmasked softmax(q k^T / sqrt(d)) v; q [B, S, heads * d], k and v [B, T, heads * d] -> as
        q; T is S in self-attention.
        """
        ...

    def attention_relative(
        self, q: T, k: T, v: T, w: Weights[T], *, num_heads: int, grid: tuple[int, int]
    ) -> T:
        """Unmasked attention between the cells of a grid (height H, width W), with decomposed
        relative positions (Li et al., arXiv 2112.01526; Segment Anything, arXiv 2304.02643).

        q, k, v [B, H * W, heads * d] -> the same; parameters rows [2H - 1, d] and columns
        [2W - 1, d]. The score of a query at (i, j) and a key at (k, l) is
        q . k / sqrt(d) + q . rows[i - k + H - 1] + q . columns[j - l + W - 1].
        """
        ...

    def attention_cached(
        self,
        q: T,
        k: T,
        v: T,
        past: tuple[T, T],
        step: Step[T],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
    ) -> tuple[T, T, T]:
        """Rotate q and k in float32, write k and v into the cache, attend to what the mask shows.

        `window` is the one that made the mask; a fused kernel masks by itself.

        q [B, S, heads * d], k and v [B, S, kv_heads * d], past two of [B, kv_heads, S_max, d].
        Rotation pairs channel c with c + d / 2 (the "rotate half" form). Returns the output
        [B, S, heads * d] and the two caches with rows positions[b, 0] .. + S replaced.
        """
        ...

    def attention_rotary(self, q: T, k: T, v: T, angles: T, *, num_heads: int, head_dim: int) -> T:
        """Unmasked attention with q and k rotated by angles [S, d / 2], the same for every head.

        Channel c pairs with c + d / 2; angles are float32, and so is the rotation.
        """
        ...

    def ms_deform_attn(
        self,
        value: T,
        offsets: T,
        scores: T,
        *,
        grid: tuple[int, int],
        num_levels: int,
        num_heads: int,
        num_points: int,
        head_dim: int,
        reference: Array,
    ) -> T:
        """The core of multi-scale deformable attention (Zhu et al., arXiv 2010.04159).

        All levels have one grid (height, width). value [B, levels * height * width, heads * d];
        offsets [B, Q, heads * levels * points * 2] as (x, y) in cells; scores
        [B, Q, heads * levels * points], softmaxed over levels and points; reference [Q, 2]
        float32 as (x, y) in 0..1. Bilinear samples, zeros outside, in float32
        -> [B, Q, heads * d].
        """
        ...

    def layer_merge(self, xs: Sequence[T], w: Weights[T], eps: float) -> T:
        """Weighted sum of normalised, projected levels (COMM, arXiv 2310.08825).

        sum over i of scale_i * (layer_norm_i(x_i) @ weight_i + bias_i), xs each [B, S, D].
        Parameters: norm.weight, norm.bias [L, D], scale [L], linear.weight [L * D, O] (the levels'
        matrices on top of each other), linear.bias [L, O].
        """
        ...

    def positions(self, ids: T, start: T) -> T:
        """start[:, None] + arange(S): ids [B, S], start [B] -> [B, S] int64."""
        ...

    def causal_mask(self, positions: T, cache: T, window: int | None) -> T:
        """[B, 1, S, S_max] bool: cache row t is visible to a token at p if p - window < t <= p."""
        ...

    # -- tokens ----------------------------------------------------------------------------

    def place_tokens(self, x: T, features: T, rows: T) -> T:
        """Image features in place of text: out[b, s] = features[rows[b, s]] where rows >= 0.

        x [B, S, D], features [F, D] with F >= 1, rows [B, S] int64, -1 keeps x.
        """
        ...

    def take(self, x: T, at: T) -> T:
        """out[b, p] = x[b, at[b, p]]: x [B, S, D], at [B, P] int64 -> [B, P, D]."""
        ...

    def prepend(self, x: T, tokens: T) -> T:
        """Tokens in front of every row: x [B, S, D], tokens [D] or [N, D] -> [B, N + S, D]."""
        ...

    def weighted_gather(self, x: T, rows: T, weights: T) -> T:
        """out[i] = sum over k of weights[i, k] * x[rows[i, k]]: x [F, D] -> [O, D]."""
        ...

    def max_gather(self, x: T, rows: T) -> T:
        """out[i] = elementwise maximum over k of x[rows[i, k]]: x [F, D], rows [O, K] -> [O, D]."""
        ...

    # -- shape -----------------------------------------------------------------------------

    def concat(self, xs: Sequence[T], axis: int) -> T:
        """The tensors joined along `axis`."""
        ...

    def slice(self, x: T, axis: int, start: int, stop: int | None, step: int = 1) -> T:
        """x[start:stop:step] along `axis`; None runs to the end, a negative stop counts from it."""
        ...

    def reshape(self, x: T, shape: tuple[int, ...]) -> T:
        """The same values in `shape`; 0 keeps that axis, one -1 is inferred."""
        ...

    def transpose(self, x: T, axes: tuple[int, ...]) -> T:
        """Axes permuted as in NumPy."""
        ...

    def constant(self, name: str, value: Array) -> T:
        """A float32 table computed from the configuration (rotary angles).

        It stays float32 in every dtype of the model: at position 30,000 half precision is off by
        whole radians.
        """
        ...

    def to_float32(self, x: T) -> T:
        """x in float32, to be used together with a table."""
        ...

    # -- precision -------------------------------------------------------------------------

    def fake_quant(
        self, x: T, scale: Array, *, axis: int | None, path: str, to: EightBits = "int8"
    ) -> T:
        """clip(round(x / scale), -128, 127) * scale: rounding to 8 bits.

        Rounds half to even; `scale` is a scalar, or a vector along `axis`; `path` names it. to:
        "fp8" rounds x / scale to E4M3 in place of whole numbers (toolkit/ops/float8.py).
        """
        ...
