"""TorchOps: the interpreter that trains. Differentiable, any dtype, any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edgevlm.toolkit.ops import decompositions, float8
from edgevlm.toolkit.ops.vocabulary import Array, EightBits, R, Step, Weights


class TorchOps:
    """Each op in torch, in the dtype of its inputs; tables are float32 on `device`.

    checkpoint: keep only the inputs of each block and run it again in the backward pass.
    """

    def __init__(self, device: str = "cpu", *, checkpoint: bool = False) -> None:
        self.device = device
        self.checkpoint = checkpoint
        self._tables: dict[str, tuple[Array, Tensor]] = {}

    def block(self, function: Callable[..., R], w: Weights[Tensor], *args: Any) -> R:
        if not (self.checkpoint and torch.is_grad_enabled()):
            return function(self, w, *args)
        result: R = checkpoint(function, self, w, *args, use_reentrant=False)
        return result

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

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def gelu(self, x: Tensor, *, tanh: bool = False) -> Tensor:
        return F.gelu(x, approximate="tanh" if tanh else "none")

    def quick_gelu(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        kept: Any = _SwiGLU
        result: Tensor = kept.apply(gate, up)
        return result

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
        norms = _upcast(x).square().sum((1, 2), keepdim=True).sqrt()
        ratios = (norms / (norms.mean(-1, keepdim=True) + eps)).to(x.dtype)
        return (w["weight"] * ratios + 1) * x

    def attention_rotary(
        self, q: Tensor, k: Tensor, v: Tensor, angles: Tensor, *, num_heads: int, head_dim: int
    ) -> Tensor:
        cos, sin = angles.cos(), angles.sin()
        rotated = [_rotate(_split(x, num_heads), cos, sin) for x in (q, k)]
        return _attend(rotated[0], rotated[1], _split(v, num_heads), None)

    def ms_deform_attn(
        self,
        value: Tensor,
        offsets: Tensor,
        scores: Tensor,
        *,
        grid: tuple[int, int],
        num_levels: int,
        num_heads: int,
        num_points: int,
        head_dim: int,
        reference: Array,
    ) -> Tensor:
        split = (*offsets.shape[:2], num_heads, num_levels, num_points)
        weights = _upcast(scores).reshape(*split[:3], -1).softmax(-1).reshape(split)
        size = torch.tensor(grid[::-1], device=value.device)
        centre = self.constant("reference", reference)[:, None, None, None]
        points = centre + _upcast(offsets).reshape(*split, 2) / size
        cells = _upcast(value).reshape(value.shape[0], num_levels, *grid, num_heads, head_dim)
        images = cells.permute(0, 4, 1, 5, 2, 3).flatten(0, 2)
        flat = (2 * points - 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        sampled = F.grid_sample(images, flat, align_corners=False)
        weighted = sampled * weights.permute(0, 2, 3, 1, 4).flatten(0, 2)[:, None]
        summed = weighted.sum(-1).reshape(-1, num_heads, num_levels, *weighted.shape[1:3]).sum(2)
        return summed.permute(0, 3, 1, 2).flatten(2).to(value.dtype)

    def layer_merge(self, xs: Sequence[Tensor], w: Weights[Tensor], eps: float) -> Tensor:
        return decompositions.layer_merge(self, xs, w, eps)

    def weighted_gather(self, x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return (x[rows] * weights[..., None].to(x.dtype)).sum(1)

    def max_gather(self, x: Tensor, rows: Tensor) -> Tensor:
        return x[rows].amax(1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, num_heads: int) -> Tensor:
        q, k, v = (_split(x, num_heads) for x in (q, k, v))
        return _attend(q, k, v, None)

    def attention_relative(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w: Weights[Tensor],
        *,
        num_heads: int,
        grid: tuple[int, int],
    ) -> Tensor:
        """The biases as further channels: a query's for each row and column, a key's ones where
        it stands. So no tensor of all scores is needed besides the kernel's own.
        """
        height, width = grid
        q, k, v = (_split(x, num_heads) for x in (q, k, v))
        cells, root = q.reshape(*q.shape[:2], *grid, -1), math.sqrt(q.shape[-1])
        rows, columns = _relative(w["rows"], height), _relative(w["columns"], width)
        by_row = torch.einsum("bnhwd,hkd->bnhwk", cells, rows).flatten(2, 3)
        by_column = torch.einsum("bnhwd,wkd->bnhwk", cells, columns).flatten(2, 3)
        places = torch.arange(height * width, device=q.device)
        ones = [F.one_hot(places // width, height), F.one_hot(places % width, width)]
        where = torch.cat(ones, -1).to(k.dtype).expand(*k.shape[:3], -1)
        q = torch.cat([q, by_row * root, by_column * root], -1)
        y = F.scaled_dot_product_attention(q, torch.cat([k, where], -1), v, scale=1 / root)
        return y.transpose(1, 2).flatten(2)

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
        head_dim: int,
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
        visible = rows <= positions[..., None]
        if window is not None:
            visible = visible & (rows > positions[..., None] - window)
        return visible[:, None]

    def place_tokens(self, x: Tensor, features: Tensor, rows: Tensor) -> Tensor:
        return torch.where(rows[..., None] >= 0, features[rows.clamp(min=0)], x)

    def take(self, x: Tensor, at: Tensor) -> Tensor:
        return x.take_along_dim(at[..., None], dim=1)

    def prepend(self, x: Tensor, tokens: Tensor) -> Tensor:
        rows = tokens.reshape(-1, x.shape[2])
        return torch.cat([rows.expand(x.shape[0], -1, -1), x], dim=1)

    def concat(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(xs), axis)

    def slice(self, x: Tensor, axis: int, start: int, stop: int | None, step: int = 1) -> Tensor:
        cut = [slice(None)] * x.ndim
        cut[axis] = slice(start, stop, step)
        return x[tuple(cut)]

    def reshape(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])

    def transpose(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return x.permute(axes)

    def constant(self, name: str, value: Array) -> Tensor:
        """Copied to the device once, as long as the model hands in the same array."""
        known = self._tables.get(name)
        if known is None or known[0] is not value:
            known = self._tables[name] = (value, torch.tensor(value, device=self.device))
        return known[1]

    def to_float32(self, x: Tensor) -> Tensor:
        return x.float()

    def fake_quant(
        self, x: Tensor, scale: Array, *, axis: int | None, path: str, to: EightBits = "int8"
    ) -> Tensor:
        """The gradient passes where nothing was clipped (straight-through estimator)."""
        step = torch.from_numpy(scale).to(x.device, x.dtype)
        if axis is not None:
            step = step.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        return to_8_bits(x / step, to) * step


def to_8_bits(steps: Tensor, to: EightBits) -> Tensor:
    """Steps rounded to what 8 bits hold; the gradient passes where nothing was clipped."""
    low, high = (-128.0, 127.0) if to == "int8" else (-float8.LARGEST, float8.LARGEST)
    inside = steps.clamp(low, high)
    plain = inside.detach()
    whole = plain.round() if to == "int8" else plain.to(torch.float8_e4m3fn).to(plain.dtype)
    return inside + (whole - plain)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up that keeps its two inputs alone: silu(gate) is computed again when needed.

    It is the largest activation of a decoder layer, so that a layer keeps a quarter less.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        sigmoid = gate.sigmoid()
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        return gradient * up * slope, gradient * (gate * sigmoid)


def _split(x: Tensor, num_heads: int) -> Tensor:
    """[B, S, heads * d] -> [B, heads, S, d]."""
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2)


def _relative(table: Tensor, length: int) -> Tensor:
    """Rows query - key + length - 1 of a table [2 * length - 1, d], as [query, key, d]."""
    at = torch.arange(length, device=table.device)
    return table[at[:, None] - at + length - 1]


def _upcast(x: Tensor) -> Tensor:
    """Half precision as float32; anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In float32, whatever the dtype of x."""
    a, b = _upcast(x).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def _write(cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """The cache with rows positions[b, 0] .. replaced; out of place, so that gradients flow."""
    index = positions[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return cache.scatter(2, index, new)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2)
