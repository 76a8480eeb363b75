"""TrainOps: TorchOps for whole sequences, each layer run as a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edgevlm.toolkit.ops.vocabulary import R, Step, Weights
from edgevlm.training.torch_ops import TorchOps, _rotate, _split


class TrainOps(TorchOps):
    """The ops of one component in training: no cache, causal attention by torch's own kernels.

    layers: the component's layer modules by path ("layers.3"). recompute: keep only the inputs of
    each layer and run it again in the backward pass (gradient checkpointing). lora_scale, dropout:
    of low-rank adapters, see lora.py.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, recompute: bool = False) -> None:
        super().__init__()
        self.layers = layers
        self.recompute = recompute
        self.lora_scale = 1.0
        self.dropout = 0.0

    def block(self, function: Callable[..., R], w: Weights[Tensor], *args: Any) -> R:
        layer = self.layers[".".join(w.steps)]
        if not (self.recompute and torch.is_grad_enabled()):
            result: R = layer(function, self, w.steps, *args)
            return result
        result = checkpoint(layer, function, self, w.steps, *args, use_reentrant=False)
        return result

    def linear(self, x: Tensor, w: Weights[Tensor]) -> Tensor:
        """With the product of two low-rank matrices added where the layer has them."""
        y = _product(x, w["weight"], w.get("bias"))
        down = w.get("lora_a")
        if down is None:
            return y
        narrow = F.dropout(x, self.dropout) @ down if self.dropout else x @ down
        return y + self.lora_scale * (narrow @ w["lora_b"])

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
        """Every sequence begins at position 0, so that no cache is written and none comes back.

        Padding stands on the right: nothing that matters sees it, and no mask is needed.
        """
        length = q.shape[1]
        cos, sin = step.cos[:length], step.sin[:length]
        q, k = _rotate(_split(q, num_heads), cos, sin), _rotate(_split(k, num_kv_heads), cos, sin)
        v = _split(v, num_kv_heads)
        mask = None if window is None or window >= length else _band(length, window, q.device)
        grouped = num_heads != num_kv_heads
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
        return y.transpose(1, 2).flatten(2), *past

    def causal_mask(self, positions: Tensor, cache: Tensor, window: int | None) -> Tensor:
        """Nothing reads it: the kernels are causal by themselves."""
        return cache

    def place_tokens(self, x: Tensor, features: Tensor, rows: Tensor) -> Tensor:
        """Copies the rows that are wanted, so that the backward pass touches no others."""
        flat = rows.flatten()
        at = (flat >= 0).nonzero().squeeze(1)
        chosen = features.index_select(0, flat.index_select(0, at)).to(x.dtype)
        return x.flatten(0, 1).index_copy(0, at, chosen).view_as(x)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight + bias by products whose gradients have the layout of the weight, [in, out].

    F.linear with a transposed weight gives transposed gradients, each of which is copied.
    """
    if bias is None:
        return x @ weight
    flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    return flat.reshape(*x.shape[:-1], weight.shape[1])


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[S, S] bool: a token sees itself and the window - 1 tokens before it."""
    t = torch.arange(length, device=device)
    return (t <= t[:, None]) & (t > t[:, None] - window)
