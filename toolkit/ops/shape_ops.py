"""ShapeOps: the model run on shapes alone. Costs of a 7B model without its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgevlm.toolkit.ops import decompositions
from edgevlm.toolkit.ops.vocabulary import Array, EightBits, R, Step, Weights


@dataclass(frozen=True)
class Spec:
    """A tensor's shape, every axis known."""

    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Specs(Mapping[str, Spec]):
    """Parameter shapes as the weights of a shape-only run."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __getitem__(self, key: str) -> Spec:
        return Spec(self._shapes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class ShapeOps:
    """Each op's shape rule, as stated in toolkit/ops/vocabulary.py."""

    def block(self, function: Callable[..., R], w: Weights[Spec], *args: Any) -> R:
        return function(self, w, *args)

    def linear(self, x: Spec, w: Weights[Spec]) -> Spec:
        return Spec((*x.shape[:-1], w["weight"].shape[1]))

    def unembed(self, x: Spec, w: Weights[Spec]) -> Spec:
        return Spec((*x.shape[:-1], w["weight"].shape[0]))

    def embed(self, ids: Spec, w: Weights[Spec]) -> Spec:
        return Spec((*ids.shape, w["weight"].shape[1]))

    def conv(
        self, x: Spec, w: Weights[Spec], *, stride: int, padding: int = 0, groups: int = 1
    ) -> Spec:
        out, _, *kernel = w["weight"].shape
        sizes = zip(x.shape[2:], kernel, strict=True)
        return Spec((x.shape[0], out, *((n + 2 * padding - k) // stride + 1 for n, k in sizes)))

    def layer_norm(self, x: Spec, w: Weights[Spec], eps: float) -> Spec:
        return x

    def rms_norm(self, x: Spec, w: Weights[Spec], eps: float) -> Spec:
        return x

    def add(self, a: Spec, b: Spec) -> Spec:
        return Spec(np.broadcast_shapes(a.shape, b.shape))

    def mul(self, a: Spec, b: Spec) -> Spec:
        return Spec(np.broadcast_shapes(a.shape, b.shape))

    def scale(self, x: Spec, factor: float) -> Spec:
        return x

    def gelu(self, x: Spec, *, tanh: bool = False) -> Spec:
        return x

    def quick_gelu(self, x: Spec) -> Spec:
        return x

    def swiglu(self, gate: Spec, up: Spec) -> Spec:
        return gate

    def relu(self, x: Spec, *, limit: float | None = None) -> Spec:
        return x

    def sigmoid(self, x: Spec) -> Spec:
        return x

    def softmax(self, x: Spec) -> Spec:
        return x

    def mean(self, x: Spec, axes: tuple[int, ...]) -> Spec:
        gone = {axis % len(x.shape) for axis in axes}  # negative axes count from the end
        return Spec(tuple(1 if i in gone else n for i, n in enumerate(x.shape)))

    def sum(self, x: Spec, axes: tuple[int, ...]) -> Spec:
        return self.mean(x, axes)

    def response_norm(self, x: Spec, w: Weights[Spec], eps: float) -> Spec:
        return x

    def attention_rotary(
        self, q: Spec, k: Spec, v: Spec, angles: Spec, *, num_heads: int, head_dim: int
    ) -> Spec:
        return q

    def ms_deform_attn(
        self,
        value: Spec,
        offsets: Spec,
        scores: Spec,
        *,
        grid: tuple[int, int],
        num_levels: int,
        num_heads: int,
        num_points: int,
        head_dim: int,
        reference: Array,
    ) -> Spec:
        return Spec((*offsets.shape[:2], value.shape[2]))

    def layer_merge(self, xs: Sequence[Spec], w: Weights[Spec], eps: float) -> Spec:
        return decompositions.layer_merge(self, xs, w, eps)

    def weighted_gather(self, x: Spec, rows: Spec, weights: Spec) -> Spec:
        return Spec((rows.shape[0], x.shape[1]))

    def max_gather(self, x: Spec, rows: Spec) -> Spec:
        return Spec((rows.shape[0], x.shape[1]))

    def attention(self, q: Spec, k: Spec, v: Spec, *, num_heads: int) -> Spec:
        return q

    def attention_relative(
        self, q: Spec, k: Spec, v: Spec, w: Weights[Spec], *, num_heads: int, grid: tuple[int, int]
    ) -> Spec:
        return q

    def attention_cached(
        self,
        q: Spec,
        k: Spec,
        v: Spec,
        past: tuple[Spec, Spec],
        step: Step[Spec],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
    ) -> tuple[Spec, Spec, Spec]:
        return q, *past

    def positions(self, ids: Spec, start: Spec) -> Spec:
        return ids

    def causal_mask(self, positions: Spec, cache: Spec, window: int | None) -> Spec:
        batch, length = positions.shape
        return Spec((batch, 1, length, cache.shape[2]))

    def place_tokens(self, x: Spec, features: Spec, rows: Spec) -> Spec:
        return x

    def take(self, x: Spec, at: Spec) -> Spec:
        return Spec((*at.shape, x.shape[2]))

    def prepend(self, x: Spec, tokens: Spec) -> Spec:
        return Spec((x.shape[0], x.shape[1] + tokens.size // x.shape[2], x.shape[2]))

    def concat(self, xs: Sequence[Spec], axis: int) -> Spec:
        shape = list(xs[0].shape)
        shape[axis] = sum(x.shape[axis] for x in xs)
        return Spec(tuple(shape))

    def slice(self, x: Spec, axis: int, start: int, stop: int | None, step: int = 1) -> Spec:
        shape = list(x.shape)
        shape[axis] = len(range(*slice(start, stop, step).indices(shape[axis])))
        return Spec(tuple(shape))

    def reshape(self, x: Spec, shape: tuple[int, ...]) -> Spec:
        known = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
        missing = x.size // math.prod(n for n in known if n != -1)
        return Spec(tuple(missing if n == -1 else n for n in known))

    def transpose(self, x: Spec, axes: tuple[int, ...]) -> Spec:
        return Spec(tuple(x.shape[axis] for axis in axes))

    def constant(self, name: str, value: Array) -> Spec:
        return Spec(value.shape)

    def to_float32(self, x: Spec) -> Spec:
        return x

    def fake_quant(
        self, x: Spec, scale: Array, *, axis: int | None, path: str, to: EightBits = "int8"
    ) -> Spec:
        return x
