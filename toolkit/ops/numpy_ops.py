"""NumpyOps: what every other interpreter, engine and kernel is compared with.

Clear before fast: each op is its definition. Values are float32 (float64 inputs stay float64);
weights may be stored in half precision, and are upcast before anything is computed with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgevlm.toolkit.ops import decompositions, float8
from edgevlm.toolkit.ops.vocabulary import Array, EightBits, R, Step, Weights


class NumpyOps:
    """The reference. Weights may be any mapping from key to array, also one that reads lazily."""

    def block(self, function: Callable[..., R], w: Weights[Array], *args: Any) -> R:
        return function(self, w, *args)

    def linear(self, x: Array, w: Weights[Array]) -> Array:
        y = _product(x, w["weight"])
        bias = w.get("bias")
        return np.asarray(y if bias is None else y + bias)

    def unembed(self, x: Array, w: Weights[Array]) -> Array:
        return _product(x, w["weight"].T)

    def embed(self, ids: Array, w: Weights[Array]) -> Array:
        return _float32(w["weight"][ids])

    def conv(
        self, x: Array, w: Weights[Array], *, stride: int, padding: int = 0, groups: int = 1
    ) -> Array:
        """Tap by tap: memory stays near that of the input."""
        kernel, bias = _float32(w["weight"]), w.get("bias")
        pad = ((0, 0), (0, 0), (padding, padding), (padding, padding))
        wide = np.pad(x, pad) if padding else x
        tall, broad = (
            (n - k) // stride + 1 for n, k in zip(wide.shape[2:], kernel.shape[2:], strict=True)
        )
        kernels = kernel.reshape(groups, -1, *kernel.shape[1:])
        y: Array = np.zeros((x.shape[0], groups, kernels.shape[1], tall, broad), x.dtype)
        for i, j in np.ndindex(*kernel.shape[2:]):
            rows, columns = (
                slice(i, i + stride * tall, stride),
                slice(j, j + stride * broad, stride),
            )
            piece = wide[:, :, rows, columns].reshape(x.shape[0], groups, -1, tall, broad)
            if kernels.shape[1] == 1 == kernels.shape[2]:
                y += piece * kernels[:, :, 0, i, j][:, :, None, None]
            else:
                y += np.einsum("ngchw,goc->ngohw", piece, kernels[..., i, j], optimize=True)
        y = y.reshape(x.shape[0], -1, tall, broad)
        return np.asarray(y if bias is None else y + bias[:, None, None])

    def layer_norm(self, x: Array, w: Weights[Array], eps: float) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps)
        return np.asarray(centred / scale * w["weight"] + w["bias"])

    def rms_norm(self, x: Array, w: Weights[Array], eps: float) -> Array:
        return np.asarray(x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * w["weight"])

    def add(self, a: Array, b: Array) -> Array:
        return np.asarray(_float32(a) + _float32(b))

    def mul(self, a: Array, b: Array) -> Array:
        return np.asarray(_float32(a) * _float32(b))

    def scale(self, x: Array, factor: float) -> Array:
        return np.asarray(x * factor)

    def gelu(self, x: Array, *, tanh: bool = False) -> Array:
        if tanh:
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            return np.asarray(0.5 * x * (1 + np.tanh(inner)))
        return np.asarray(0.5 * x * (1 + erf(x / math.sqrt(2))))

    def quick_gelu(self, x: Array) -> Array:
        return np.asarray(x * _sigmoid(1.702 * x))

    def swiglu(self, gate: Array, up: Array) -> Array:
        return gate * _sigmoid(gate) * up

    def relu(self, x: Array, *, limit: float | None = None) -> Array:
        return np.clip(x, 0, limit)

    def sigmoid(self, x: Array) -> Array:
        return _sigmoid(x)

    def softmax(self, x: Array) -> Array:
        return _softmax(_float32(x))

    def mean(self, x: Array, axes: tuple[int, ...]) -> Array:
        return np.asarray(x.mean(axes, keepdims=True))

    def sum(self, x: Array, axes: tuple[int, ...]) -> Array:
        return np.asarray(x.sum(axes, keepdims=True))

    def response_norm(self, x: Array, w: Weights[Array], eps: float) -> Array:
        norms = np.sqrt(np.square(x).sum((1, 2), keepdims=True))
        ratios = norms / (norms.mean(-1, keepdims=True) + eps)
        return np.asarray((w["weight"] * ratios + 1) * x)

    def attention(self, q: Array, k: Array, v: Array, *, num_heads: int) -> Array:
        return _attend(_split(q, num_heads), _split(k, num_heads), _split(v, num_heads), None)

    def attention_relative(
        self,
        q: Array,
        k: Array,
        v: Array,
        w: Weights[Array],
        *,
        num_heads: int,
        grid: tuple[int, int],
    ) -> Array:
        """Head by head: the scores of a large image fill a gigabyte."""
        height, width = grid
        rows = _relative(_float32(w["rows"]), height)
        columns = _relative(_float32(w["columns"]), width)
        queries, keys, values = (_split(x, num_heads) for x in (q, k, v))
        mixed = np.empty_like(values)
        for at in np.ndindex(queries.shape[:2]):
            cells = queries[at].reshape(height, width, -1)
            by_row = cells @ rows
            by_column = (cells.swapaxes(0, 1) @ columns).swapaxes(0, 1)
            bias = by_row[..., :, None] + by_column[..., None, :]
            scores = queries[at] @ keys[at].T / math.sqrt(cells.shape[-1])
            mixed[at] = _softmax(scores + bias.reshape(scores.shape)) @ values[at]
        return np.asarray(mixed.transpose(0, 2, 1, 3).reshape(v.shape))

    def attention_cached(
        self,
        q: Array,
        k: Array,
        v: Array,
        past: tuple[Array, Array],
        step: Step[Array],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
    ) -> tuple[Array, Array, Array]:
        cos, sin = step.cos[step.positions][:, None], step.sin[step.positions][:, None]
        rotated = _rotate(_split(q, num_heads), cos, sin)
        keys = _write(past[0], _rotate(_split(k, num_kv_heads), cos, sin), step.positions)
        values = _write(past[1], _split(v, num_kv_heads), step.positions)
        return _attend(rotated, keys, values, step.mask), keys, values

    def attention_rotary(
        self, q: Array, k: Array, v: Array, angles: Array, *, num_heads: int, head_dim: int
    ) -> Array:
        cos, sin = np.cos(angles), np.sin(angles)
        rotated_q, rotated_k = (_rotate(_split(x, num_heads), cos, sin) for x in (q, k))
        return _attend(rotated_q, rotated_k, _split(v, num_heads), None)

    def ms_deform_attn(
        self,
        value: Array,
        offsets: Array,
        scores: Array,
        *,
        grid: tuple[int, int],
        num_levels: int,
        num_heads: int,
        num_points: int,
        head_dim: int,
        reference: Array,
    ) -> Array:
        split = (*offsets.shape[:2], num_heads, num_levels, num_points)
        cells = value.reshape(value.shape[0], num_levels, *grid, num_heads, head_dim)
        weights = _softmax(scores.reshape(*split[:3], -1)).reshape(split)
        points = sampling_points(offsets.reshape(*split, 2), reference, grid)
        sampled = _bilinear(cells.transpose(0, 4, 1, 2, 3, 5), points.transpose(0, 2, 3, 1, 4, 5))
        weighted = sampled * weights.transpose(0, 2, 3, 1, 4)[..., None]
        return np.asarray(weighted.sum((2, 4)).transpose(0, 2, 1, 3).reshape(*split[:2], -1))

    def layer_merge(self, xs: Sequence[Array], w: Weights[Array], eps: float) -> Array:
        return decompositions.layer_merge(self, xs, w, eps)

    def positions(self, ids: Array, start: Array) -> Array:
        return np.asarray(start[:, None] + np.arange(ids.shape[1]))

    def causal_mask(self, positions: Array, cache: Array, window: int | None) -> Array:
        rows = np.arange(cache.shape[2])
        visible = rows <= positions[..., None]
        if window is not None:
            visible &= rows > positions[..., None] - window
        return np.asarray(visible[:, None])

    def place_tokens(self, x: Array, features: Array, rows: Array) -> Array:
        return np.where(rows[..., None] >= 0, features[np.maximum(rows, 0)], x)

    def take(self, x: Array, at: Array) -> Array:
        return np.take_along_axis(x, at[..., None], axis=1)

    def prepend(self, x: Array, tokens: Array) -> Array:
        rows = tokens.reshape(-1, x.shape[2])
        front = np.broadcast_to(rows, (x.shape[0], *rows.shape))
        return np.concatenate([front, x], axis=1)

    def weighted_gather(self, x: Array, rows: Array, weights: Array) -> Array:
        return np.asarray((x[rows] * weights[..., None]).sum(1))

    def max_gather(self, x: Array, rows: Array) -> Array:
        return np.asarray(x[rows].max(1))

    def concat(self, xs: Sequence[Array], axis: int) -> Array:
        return np.concatenate(list(xs), axis)

    def slice(self, x: Array, axis: int, start: int, stop: int | None, step: int = 1) -> Array:
        cut = [slice(None)] * x.ndim
        cut[axis] = slice(start, stop, step)
        return x[tuple(cut)]

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        return np.asarray(x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)]))

    def transpose(self, x: Array, axes: tuple[int, ...]) -> Array:
        return np.asarray(x.transpose(axes))

    def constant(self, name: str, value: Array) -> Array:
        return value

    def to_float32(self, x: Array) -> Array:
        return np.asarray(x, np.float32)

    def fake_quant(
        self, x: Array, scale: Array, *, axis: int | None, path: str, to: EightBits = "int8"
    ) -> Array:
        step = scale if axis is None else _along(scale, axis, x.ndim)
        steps = _float32(x) / step
        whole = np.clip(np.rint(steps), -128, 127) if to == "int8" else float8.rounded(steps)
        return np.asarray(whole * step)


def _float32(x: Array) -> Array:
    """Half precision as float32; anything else as it is."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def _product(x: Array, matrix: Array) -> Array:
    """x @ matrix. Half precision goes to float32 in pieces: an output layer has gigabytes."""
    if matrix.dtype != np.float16:
        return np.asarray(x @ matrix)
    transposed = matrix.flags.f_contiguous
    lines = max((1 << 22) // matrix.shape[0 if transposed else 1], 1)
    pieces = range(0, matrix.shape[1 if transposed else 0], lines)
    if transposed:
        return np.concatenate([x @ _float32(matrix[:, i : i + lines]) for i in pieces], -1)
    total: Array = x[..., :lines] @ _float32(matrix[:lines])
    for i in pieces[1:]:
        total += x[..., i : i + lines] @ _float32(matrix[i : i + lines])
    return total


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))  # the tanh form never overflows


def _softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def sampling_points(offsets: Array, reference: Array, grid: tuple[int, int]) -> Array:
    """Where deformable attention samples, in cells from the centre of the first.

    offsets [B, Q, M, L, P, 2], reference [Q, 2], grid (height, width) -> [B, Q, M, L, P, 2].
    """
    size = np.asarray(grid[::-1], offsets.dtype)
    points = reference[:, None, None, None] + offsets / size
    return np.asarray(points * size - 0.5, offsets.dtype)


def _bilinear(cells: Array, points: Array) -> Array:
    """cells [B, M, L, H, W, d] at points [B, M, L, Q, P, 2] as (x, y) -> [B, M, L, Q, P, d]."""
    height, width = cells.shape[3:5]
    low = np.floor(points).astype(np.int64)
    fraction = points - low
    b, m, n = (i[..., None, None] for i in np.ogrid[tuple(map(slice, cells.shape[:3]))])
    total = np.zeros((*points.shape[:-1], cells.shape[-1]), cells.dtype)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        x, y = low[..., 0] + dx, low[..., 1] + dy
        weight = np.abs(1 - dx - fraction[..., 0]) * np.abs(1 - dy - fraction[..., 1])
        weight = weight * ((x >= 0) & (x < width) & (y >= 0) & (y < height))
        total += cells[b, m, n, y.clip(0, height - 1), x.clip(0, width - 1)] * weight[..., None]
    return total


def _split(x: Array, num_heads: int) -> Array:
    """[B, S, heads * d] -> [B, heads, S, d]."""
    return np.asarray(x.reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3))


def _relative(table: Array, length: int) -> Array:
    """Rows query - key + length - 1 of a table [2 * length - 1, d], as [query, d, key]."""
    at = np.arange(length)
    return np.asarray(table[at[:, None] - at + length - 1].swapaxes(1, 2))


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
    mixed = _softmax(scores) @ v
    return np.asarray(mixed.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1), q.dtype)


def _along(scale: Array, axis: int, ndim: int) -> Array:
    shape = [1] * ndim
    shape[axis] = -1
    return np.asarray(scale.reshape(shape))


def erf(x: Array) -> Array:
    """The error function to about 1e-7 absolute, elementwise, in x's float type.

    Source: the Chebyshev fit of erfc in Press et al., Numerical Recipes, section 6.2. Works in
    pieces: float64 temporaries of a whole activation would take several times its memory.
    """
    out = np.empty(x.size, x.dtype)
    flat = np.ascontiguousarray(x).reshape(-1)
    for start in range(0, x.size, _PIECE):
        piece = slice(start, start + _PIECE)
        out[piece] = _erf(flat[piece])
    return np.asarray(out.reshape(x.shape))


def _erf(x: Array) -> Array:
    wide = np.abs(x.astype(np.float64))
    t = 1 / (1 + 0.5 * wide)
    poly = np.full_like(t, _ERFC[-1])
    for coefficient in _ERFC[-2::-1]:
        poly = poly * t + coefficient
    tail = t * np.exp(-wide * wide + poly)
    return np.asarray(np.sign(x) * (1 - tail), x.dtype)


_PIECE = 1 << 18
_ERFC = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806,
    0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277,
)  # fmt: skip
