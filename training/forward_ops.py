"""TorchOps without gradients: fewer passes over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from edgevlm.toolkit.ops import float8
from edgevlm.toolkit.ops.vocabulary import Array, EightBits, Weights
from edgevlm.training.torch_ops import TorchOps


class ForwardOps(TorchOps):
    """Adds biases while it multiplies, and computes in place where nothing else reads."""

    def linear(self, x: Tensor, w: Weights[Tensor]) -> Tensor:
        weight, bias = w["weight"], w.get("bias")
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    def quick_gelu(self, x: Tensor) -> Tensor:
        return (1.702 * x).sigmoid_().mul_(x)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate).mul_(up)

    def fake_quant(
        self, x: Tensor, scale: Array, *, axis: int | None, path: str, to: EightBits = "int8"
    ) -> Tensor:
        step = torch.from_numpy(scale).to(x.dtype)
        if axis is not None:
            step = step.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        if to == "fp8":
            inside = (x / step).clamp_(-float8.LARGEST, float8.LARGEST)
            return inside.to(torch.float8_e4m3fn).to(x.dtype).mul_(step)
        return (x / step).clamp_(-128, 127).round_().mul_(step)
