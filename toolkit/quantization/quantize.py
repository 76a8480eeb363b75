"""Quantize: the ops with a precision plan applied to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.quantization.plan import PrecisionPlan

T = TypeVar("T")


class Quantize(Wrapper[T]):
    """Applies a plan: input and weight of every INT8 layer pass through `fake_quant`.

    Activations: one symmetric scale per tensor, from the plan's ranges. Weights: one symmetric
    scale per output channel, from `weights` (the arrays; the inner ops may hold names or
    parameters). Running it is fake quantization; recording it gives QuantizeLinear and
    DequantizeLinear.
    """

    def __init__(
        self,
        inner: Ops[T],
        component: str,
        plan: PrecisionPlan,
        weights: Callable[[str], Array],
    ) -> None:
        super().__init__(inner, component)
        self._plan = plan
        self._weights = weights

    def linear(self, x: T, w: Weights[T]) -> T:
        if self._plan.at(self.path_of(w)) != "int8":
            return self.inner.linear(x, w)
        return self.inner.linear(self._input(x, w), self._weight(w, axis=1))

    def conv(self, x: T, w: Weights[T], **sizes: int) -> T:
        if self._plan.at(self.path_of(w)) != "int8":
            return self.inner.conv(x, w, **sizes)
        return self.inner.conv(self._input(x, w), self._weight(w, axis=0), **sizes)

    def _input(self, x: T, w: Weights[T]) -> T:
        path = self.path_of(w)
        if path not in self._plan.ranges:
            raise CalibrationError(
                f"the plan has no range for the input of {path}",
                hint="calibrate again with samples that reach every component",
            )
        scale = np.float32(max(self._plan.ranges[path], 1e-8) / 127)
        path = f"{w.path}/input"
        return self.inner.fake_quant(x, np.asarray(scale), axis=None, path=path)

    def _weight(self, w: Weights[T], axis: int) -> Weights[T]:
        array = np.abs(self._weights(w.key("weight")).astype(np.float32))
        others = tuple(i for i in range(array.ndim) if i != axis)
        scale = np.maximum(array.max(others), 1e-8).astype(np.float32) / np.float32(127)
        path = f"{w.path}/weight"
        rounded = self.inner.fake_quant(w["weight"], scale, axis=axis, path=path)
        bias = w.get("bias")
        return w.holding(weight=rounded) if bias is None else w.holding(weight=rounded, bias=bias)
