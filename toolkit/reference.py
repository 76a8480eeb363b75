"""NumpyOps: what every other interpreter, engine and kernel is compared with.

Clear before fast: each op is its definition. Values are float32 (float64 inputs stay float64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from toolkit.ops import Array, Norm, Step, Weights


class NumpyOps:
    """The oracle. Weights may be any mapping from key to array, also one that reads lazily."""

    def linear(self, x: Array, w: Weights[Array]) -> Array:
        y = x @ w["weight"]
        bias = w.get("bias")
        return np.asarray(y if bias is None else y + bias)

    def unembed(self, x: Array, w: Weights[Array]) -> Array:
        return np.asarray(x @ w["weight"].T)

    def embed(self, ids: Array, w: Weights[Array]) -> Array:
        return np.asarray(w["weight"][ids])

    def conv(
        self, x: Array, w: Weights[Array], *, stride: int, padding: int = 0, groups: int = 1
    ) -> Array:
        kernel, bias = w["weight"], w.get("bias")
        pad = ((0, 0), (0, 0), (padding, padding), (padding, padding))
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(x, pad), kernel.shape[2:], axis=(2, 3)
        )[:, :, ::stride, ::stride]
        n, _, h, width = windows.shape[:4]
        grouped = windows.reshape(n, groups, -1, h, width, *kernel.shape[2:])
        kernels = kernel.reshape(groups, -1, *kernel.shape[1:])
        y = np.einsum("ngchwij,gocij->ngohw", grouped, kernels, optimize=True)
        y = y.reshape(n, -1, h, width)
        return np.asarray(y if bias is None else y + bias[:, None, None])

    def layer_norm(self, x: Array, w: Weights[Array], eps: float) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps)
        return np.asarray(centred / scale * w["weight"] + w["bias"])

    def rms_norm(self, x: Array, w: Weights[Array], eps: float) -> Array:
        return np.asarray(x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * w["weight"])

    def add_norm(
        self, x: Array, residual: Array, w: Weights[Array], eps: float, kind: Norm
    ) -> tuple[Array, Array]:
        total = x + residual
        norm = self.rms_norm if kind == "rms" else self.layer_norm
        return norm(total, w, eps), total

    def add(self, a: Array, b: Array) -> Array:
        return np.asarray(a + b)

    def mul(self, a: Array, b: Array) -> Array:
        return np.asarray(a * b)

    def gelu(self, x: Array, *, tanh: bool = False) -> Array:
        if tanh:
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            return np.asarray(0.5 * x * (1 + np.tanh(inner)))
        return np.asarray(0.5 * x * (1 + erf(x / math.sqrt(2))))

    def quick_gelu(self, x: Array) -> Array:
        return np.asarray(x * _sigmoid(1.702 * x))

    def swiglu(self, gate: Array, up: Array) -> Array:
        return gate * _sigmoid(gate) * up

    def attention(self, q: Array, k: Array, v: Array, *, heads: int, kv_heads: int) -> Array:
        return _attend(_split(q, heads), _split(k, kv_heads), _split(v, kv_heads), None)

    def attention_cached(
        self,
        q: Array,
        k: Array,
        v: Array,
        past: tuple[Array, Array],
        step: Step[Array],
        *,
        heads: int,
        kv_heads: int,
        window: int | None,
    ) -> tuple[Array, Array, Array]:
        cos, sin = step.cos[step.positions][:, None], step.sin[step.positions][:, None]
        turned = _rotate(_split(q, heads), cos, sin)
        keys = _write(past[0], _rotate(_split(k, kv_heads), cos, sin), step.positions)
        values = _write(past[1], _split(v, kv_heads), step.positions)
        return _attend(turned, keys, values, step.mask), keys, values

    def positions(self, ids: Array, start: Array) -> Array:
        return np.asarray(start[:, None] + np.arange(ids.shape[1]))

    def causal_mask(self, positions: Array, cache: Array, window: int | None) -> Array:
        rows = np.arange(cache.shape[2])
        seen = rows <= positions[..., None]
        if window is not None:
            seen &= rows > positions[..., None] - window
        return np.asarray(seen[:, None])

    def place_tokens(self, x: Array, features: Array, rows: Array) -> Array:
        return np.where(rows[..., None] >= 0, features[np.maximum(rows, 0)], x)

    def take(self, x: Array, at: Array) -> Array:
        return np.take_along_axis(x, at[..., None], axis=1)

    def prepend(self, x: Array, token: Array) -> Array:
        front = np.broadcast_to(token, (x.shape[0], 1, x.shape[2]))
        return np.concatenate([front, x], axis=1)

    def concat(self, xs: Sequence[Array], axis: int) -> Array:
        return np.concatenate(list(xs), axis)

    def slice(self, x: Array, axis: int, start: int, stop: int | None) -> Array:
        cut = [slice(None)] * x.ndim
        cut[axis] = slice(start, stop)
        return x[tuple(cut)]

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        return np.asarray(x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)]))

    def transpose(self, x: Array, axes: tuple[int, ...]) -> Array:
        return np.asarray(x.transpose(axes))

    def constant(self, name: str, value: Array) -> Array:
        return value

    def fake_quant(
        self, x: Array, scale: Array, *, axis: int | None, bits: int, site: str
    ) -> Array:
        step = scale if axis is None else _along(scale, axis, x.ndim)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        return np.asarray(np.clip(np.rint(x / step), low, high) * step, x.dtype)


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))  # the tanh form never overflows


def _split(x: Array, heads: int) -> Array:
    """[B, S, heads * d] -> [B, heads, S, d]."""
    return np.asarray(x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3))


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _write(cache: Array, new: Array, positions: Array) -> Array:
    out: Array = cache.copy()
    for row, start in enumerate(positions[:, 0]):
        out[row, :, start : start + new.shape[2]] = new[row]
    return out


def _attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """q [B, H, S, d], k and v [B, K, T, d] with K dividing H -> [B, S, H * d]."""
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True)) @ v
    return np.asarray(mixed.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1), q.dtype)


def _along(scale: Array, axis: int, ndim: int) -> Array:
    shape = [1] * ndim
    shape[axis] = -1
    return np.asarray(scale.reshape(shape))


def erf(x: Array) -> Array:
    """The error function to about 1e-7 absolute, elementwise, in x's float type.

    Source: the Chebyshev fit of erfc in Press et al., Numerical Recipes, section 6.2.
    """
    wide = np.abs(x.astype(np.float64))
    t = 1 / (1 + 0.5 * wide)
    poly = np.full_like(t, _ERFC[-1])
    for coefficient in _ERFC[-2::-1]:
        poly = poly * t + coefficient
    tail = t * np.exp(-wide * wide + poly)
    return np.asarray(np.sign(x) * (1 - tail), x.dtype)


_ERFC = (
    -1.26551223,
    1.00002368,
    0.37409196,
    0.09678418,
    -0.18628806,
    0.27886807,
    -1.13520398,
    1.48851587,
    -0.82215223,
    0.17087277,
)
