"""TorchOps: the interpreter that trains. Differentiable, any dtype, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgevlm.toolkit.ops import decompositions
from edgevlm.toolkit.ops.vocabulary import Array, Grids, Norm, Step, Weights


class TorchOps:
    """Each op in torch; `device` and `dtype` are those of tables made by the model itself."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.dtype = dtype

    def linear(self, x: Tensor, w: Weights[Tensor]) -> Tensor:
        y = x @ w["weight"]
        bias = w.get("bias")
        return y if bias is None else y + bias

    def unembed(self, x: Tensor, w: Weights[Tensor]) -> Tensor:
        return F.linear(x, w["weight"])

    def embed(self, ids: Tensor, w: Weights[Tensor]) -> Tensor:
        return F.embedding(ids, w["weight"])

    def conv(
        self, x: Tensor, w: Weights[Tensor], *, stride: int, padding: int = 0, groups: int = 1
    ) -> Tensor:
        return F.conv2d(x, w["weight"], w.get("bias"), stride, padding, 1, groups)

    def layer_norm(self, x: Tensor, w: Weights[Tensor], eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w["weight"], w["bias"], eps)

    def rms_norm(self, x: Tensor, w: Weights[Tensor], eps: float) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], w["weight"], eps)

    def add_norm(
        self, x: Tensor, residual: Tensor, w: Weights[Tensor], eps: float, kind: Norm
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        norm = self.rms_norm if kind == "rms" else self.layer_norm
        return norm(total, w, eps), total

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def gelu(self, x: Tensor, *, tanh: bool = False) -> Tensor:
        return F.gelu(x, approximate="tanh" if tanh else "none")

    def quick_gelu(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def relu(self, x: Tensor, *, limit: float | None = None) -> Tensor:
        return x.clamp(0, limit)

    def sigmoid(self, x: Tensor) -> Tensor:
        return x.sigmoid()

    def softmax(self, x: Tensor) -> Tensor:
        return x.softmax(-1)

    def mean(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return x.mean(axes, keepdim=True)

    def sum(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return x.sum(axes, keepdim=True)

    def response_norm(self, x: Tensor, w: Weights[Tensor], eps: float) -> Tensor:
        norms = x.square().sum((1, 2), keepdim=True).sqrt()
        return (w["weight"] * (norms / (norms.mean(-1, keepdim=True) + eps)) + 1) * x

    def attention_rotary(
        self, q: Tensor, k: Tensor, v: Tensor, angles: Tensor, *, num_heads: int
    ) -> Tensor:
        cos, sin = angles.float().cos(), angles.float().sin()
        rotated = [_rotate(_split(x, num_heads).float(), cos, sin).to(x.dtype) for x in (q, k)]
        return _attend(rotated[0], rotated[1], _split(v, num_heads), None)

    def ms_deform_attn(
        self,
        value: Tensor,
        offsets: Tensor,
        scores: Tensor,
        *,
        grids: Grids,
        num_heads: int,
        num_points: int,
        head_dim: int,
        reference: Array,
    ) -> Tensor:
        batch, queries = offsets.shape[:2]
        weights = scores.float().reshape(batch, queries, num_heads, -1).softmax(-1)
        weights = weights.reshape(batch, queries, num_heads, len(grids), num_points)
        shifts = offsets.float().reshape(batch, queries, num_heads, len(grids), num_points, 2)
        cells = torch.split(_split(value, num_heads).float(), [h * w for h, w in grids], 2)
        centres = torch.from_numpy(reference).to(value.device, torch.float32)
        found = [
            _sample(level, shifts[:, :, :, i], centres[:, i % centres.shape[1]], grid, num_points)
            * weights[:, :, :, i, :, None]
            for i, (level, grid) in enumerate(zip(cells, grids, strict=True))
        ]
        return torch.stack(found).sum((0, 4)).flatten(2).to(value.dtype)

    def layer_merge(self, xs: Sequence[Tensor], w: Weights[Tensor], eps: float) -> Tensor:
        return decompositions.layer_merge(self, xs, w, eps)

    def weighted_gather(self, x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return (x[rows] * weights[..., None].to(x.dtype)).sum(1)

    def max_gather(self, x: Tensor, rows: Tensor) -> Tensor:
        return x[rows].amax(1)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, num_kv_heads: int
    ) -> Tensor:
        return _attend(_split(q, num_heads), _split(k, num_kv_heads), _split(v, num_kv_heads), None)

    def attention_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: tuple[Tensor, Tensor],
        step: Step[Tensor],
        *,
        num_heads: int,
        num_kv_heads: int,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = (table[step.positions][:, None] for table in (step.cos, step.sin))
        rotated = _rotate(_split(q, num_heads), cos, sin)
        keys = _write(past[0], _rotate(_split(k, num_kv_heads), cos, sin), step.positions)
        values = _write(past[1], _split(v, num_kv_heads), step.positions)
        return _attend(rotated, keys, values, step.mask), keys, values

    def positions(self, ids: Tensor, start: Tensor) -> Tensor:
        return start[:, None] + torch.arange(ids.shape[1], device=ids.device)

    def causal_mask(self, positions: Tensor, cache: Tensor, window: int | None) -> Tensor:
        rows = torch.arange(cache.shape[2], device=positions.device)
        seen = rows <= positions[..., None]
        if window is not None:
            seen = seen & (rows > positions[..., None] - window)
        return seen[:, None]

    def place_tokens(self, x: Tensor, features: Tensor, rows: Tensor) -> Tensor:
        return torch.where(rows[..., None] >= 0, features[rows.clamp(min=0)], x)

    def take(self, x: Tensor, at: Tensor) -> Tensor:
        return x.take_along_dim(at[..., None], dim=1)

    def prepend(self, x: Tensor, tokens: Tensor) -> Tensor:
        rows = tokens.reshape(-1, x.shape[2])
        return torch.cat([rows.expand(x.shape[0], -1, -1), x], dim=1)

    def concat(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(xs), axis)

    def slice(self, x: Tensor, axis: int, start: int, stop: int | None) -> Tensor:
        length = (x.shape[axis] if stop is None else stop) - start
        return x.narrow(axis, start, length)

    def reshape(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])

    def transpose(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return x.permute(axes)

    def constant(self, name: str, value: Array) -> Tensor:
        return torch.from_numpy(value).to(self.device, self.dtype)

    def fake_quant(
        self, x: Tensor, scale: Array, *, axis: int | None, bits: int, path: str
    ) -> Tensor:
        """The gradient passes where nothing was clipped (straight-through estimator)."""
        step = torch.from_numpy(scale).to(x.device, x.dtype)
        if axis is not None:
            step = step.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scaled = x / step
        inside = scaled.clamp(low, high)
        return (inside + (inside.round() - inside).detach()) * step


def _split(x: Tensor, num_heads: int) -> Tensor:
    """[B, S, heads * d] -> [B, heads, S, d]."""
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _write(cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """The cache with rows positions[b, 0] .. replaced; out of place, so that gradients flow."""
    index = positions[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return cache.scatter(2, index, new)


def _sample(
    cells: Tensor, shifts: Tensor, reference: Tensor, grid: tuple[int, int], num_points: int
) -> Tensor:
    """cells [B, M, h * w, d] at places of [B, Q, M, P] -> [B, Q, M, P, d], zeros outside."""
    batch, num_heads, _, width = cells.shape
    centre = reference[:, None, None, :2]
    if reference.shape[-1] == 4:
        places = centre + shifts / num_points * reference[:, None, None, 2:] * 0.5
    else:
        places = centre + shifts / torch.tensor(grid[::-1], device=shifts.device)
    images = cells.transpose(2, 3).reshape(batch * num_heads, width, *grid)
    flat = (2 * places - 1).transpose(1, 2).flatten(0, 1)
    found = F.grid_sample(images, flat, align_corners=False)
    return found.reshape(batch, num_heads, *found.shape[1:]).permute(0, 3, 1, 4, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2)
