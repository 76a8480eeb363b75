"""Quantization-aware training: forward passes see the rounded weights, gradients pass through.

Rounding to nearest with a straight-through estimator (Bengio et al., arXiv 1308.3432), in exactly
the storage formats that a bundle of the same precision plan holds (toolkit/quantization). So what
is trained is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from edgevlm.toolkit.ops.vocabulary import EightBits, Ops, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.quantization import static
from edgevlm.toolkit.quantization.blockwise import ZERO_POINT, Bits, block_of
from edgevlm.toolkit.quantization.plan import TABLES_IN_8_BITS, WEIGHT_BITS, PrecisionPlan
from edgevlm.toolkit.quantization.static import Form
from edgevlm.toolkit.vlm.components import Component
from edgevlm.training.torch_ops import to_8_bits
from edgevlm.training.train_ops import TrainOps


def wrapper(plan: PrecisionPlan) -> Callable[[TrainOps, Component], Ops[Tensor]]:
    """What VLM puts around the ops of its components."""

    def wrap(op: TrainOps, part: Component) -> Ops[Tensor]:
        wrapped: Any = FakeQuantize(op, part.name, plan)
        ops: Ops[Tensor] = wrapped
        return ops

    return wrap


class FakeQuantize(Wrapper[Tensor]):
    """Applies a plan to the ops of one component, with scales taken from the current weights."""

    inner: Any

    def __init__(self, inner: TrainOps, component: str, plan: PrecisionPlan) -> None:
        super().__init__(inner, component)
        self._plan = plan

    def linear(self, x: Tensor, w: Weights[Tensor]) -> Tensor:
        """An adapter is added to its matrix before rounding, as it is when it is merged."""
        precision = self._plan.at(self.path_of(w))
        if precision == "float":
            result: Tensor = self.inner.linear(x, w)
            return result
        matrix = w["weight"]
        down = w.get("lora_a")
        if down is not None:
            matrix = matrix + self.inner.lora_scale * (down @ w["lora_b"])
        form = static.form_at(self._plan, self.path_of(w))
        if form is not None:
            x, rounded = self._input(x, w, form), _static(matrix, 1, form)
        elif precision == "int8_rows":
            x, rounded = _by_row(x), _by_channel(matrix, 1)
        else:
            block = self._plan.block_at(self.path_of(w))
            rounded = round_blocks(matrix.t(), WEIGHT_BITS[precision], block).t()
        result = self.inner.linear(x, _with(w, rounded))
        return result

    def conv(self, x: Tensor, w: Weights[Tensor], **sizes: int) -> Tensor:
        form = static.form_at(self._plan, self.path_of(w))
        if form is not None:
            x, w = self._input(x, w, form), _with(w, _static(w["weight"], 0, form))
        result: Tensor = self.inner.conv(x, w, **sizes)
        return result

    def embed(self, ids: Tensor, w: Weights[Tensor]) -> Tensor:
        result: Tensor = self.inner.embed(ids, self._table(w))
        return result

    def unembed(self, x: Tensor, w: Weights[Tensor]) -> Tensor:
        result: Tensor = self.inner.unembed(x, self._table(w))
        return result

    def layer_merge(self, xs: Sequence[Tensor], w: Weights[Tensor], eps: float) -> Tensor:
        """Its matrix is stored in float by every plan of weights alone."""
        if static.form_at(self._plan, self.path_of(w / "linear")) is not None:
            return super().layer_merge(xs, w, eps)
        result: Tensor = self.inner.layer_merge(xs, w, eps)
        return result

    def _table(self, w: Weights[Tensor]) -> Weights[Tensor]:
        """An embedding table, whose rows have 8 bits in every plan of weights alone."""
        if self._plan.at(self.path_of(w)) not in TABLES_IN_8_BITS:
            return w
        return _with(w, round_blocks(w["weight"], 8))

    def _input(self, x: Tensor, w: Weights[Tensor], form: Form) -> Tensor:
        step = static.input_step(self._plan.ranges, self.path_of(w), form)
        return _rounded(x, x.new_tensor(float(step)), form.to)


def round_blocks(rows: Tensor, bits: Bits, most: int | None = None) -> Tensor:
    """The floats that stand for `rows` [outputs, inputs] in blockwise storage, see blockwise.py.

    most: the largest block. Rows whose inputs no block size divides stay as they are, as they do
    in a bundle.
    """
    outputs, inputs = rows.shape
    block = block_of(inputs, most)
    if block is None:
        return rows
    blocks = rows.detach().float().reshape(outputs, -1, block)
    if bits == 8:
        scales = blocks.abs().amax(-1, keepdim=True) / 127
    else:
        farthest = blocks.abs().argmax(-1, keepdim=True)
        scales = blocks.gather(-1, farthest) / -8
    steps = torch.where(scales == 0, 1.0, scales)
    zero_point = ZERO_POINT[bits]
    codes = (blocks / steps).round().clamp(-zero_point, zero_point - 1)
    values = (codes * scales).reshape(outputs, inputs).to(rows.dtype)
    return rows + (values - rows).detach()


def _by_channel(weight: Tensor, axis: int) -> Tensor:
    """8 bits with one scale for each output channel, which are along `axis`."""
    others = [i for i in range(weight.ndim) if i != axis]
    largest = weight.detach().float().abs().amax(others, keepdim=True)
    return _rounded(weight, (largest.clamp(min=1e-8) / 127).to(weight.dtype))


def _static(weight: Tensor, axis: int, form: Form) -> Tensor:
    """As quantization/static.py stores it."""
    if form.by_channel:
        return _by_channel(weight, axis)
    step = form.steps(weight.detach().float().abs().amax().cpu().numpy())
    return _rounded(weight, weight.new_tensor(float(step)), form.to)


def _by_row(x: Tensor) -> Tensor:
    """8 bits with one scale for each row of the last axis."""
    return _rounded(x, x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127)


def _rounded(x: Tensor, step: Tensor, to: EightBits = "int8") -> Tensor:
    """To 8 bits; the gradient passes where nothing was clipped."""
    return to_8_bits(x / step, to) * step


def _with(w: Weights[Tensor], weight: Tensor) -> Weights[Tensor]:
    """The weights of a layer with another matrix, and no adapter."""
    bias = w.get("bias")
    return w.holding(weight=weight) if bias is None else w.holding(weight=weight, bias=bias)
