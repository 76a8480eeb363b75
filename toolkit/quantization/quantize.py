"""Quantize: the ops with a precision plan applied to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from edgevlm.toolkit.ops.vocabulary import Array, Ops, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.quantization import static
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.quantization.static import Form

T = TypeVar("T")


class Quantize(Wrapper[T]):
    """Applies a plan: input and weight of every layer in static INT8 or FP8 pass `fake_quant`.

    Activations: one symmetric scale per tensor, from the plan's ranges. Weights: symmetric scales
    as static.py has them, from `weights` (the arrays; the inner ops may hold names or parameters),
    which are read once. Running it is fake quantization; recording it gives QuantizeLinear and
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
        self._scales: dict[str, Array] = {}

    def linear(self, x: T, w: Weights[T]) -> T:
        form = static.form_at(self._plan, self.path_of(w))
        if form is None:
            return self.inner.linear(x, w)
        return self.inner.linear(self._input(x, w, form), self._weight(w, 1, form))

    def conv(self, x: T, w: Weights[T], **sizes: int) -> T:
        form = static.form_at(self._plan, self.path_of(w))
        if form is None:
            return self.inner.conv(x, w, **sizes)
        return self.inner.conv(self._input(x, w, form), self._weight(w, 0, form), **sizes)

    def _input(self, x: T, w: Weights[T], form: Form) -> T:
        scale = static.input_step(self._plan.ranges, self.path_of(w), form)
        return self.inner.fake_quant(x, scale, axis=None, path=f"{w.path}/input", to=form.to)

    def _weight(self, w: Weights[T], axis: int, form: Form) -> Weights[T]:
        path, key = f"{w.path}/weight", w.key("weight")
        if key not in self._scales:  # they read the whole weight
            self._scales[key] = static.scales(self._weights(key), form)
        scale, along = self._scales[key], axis if form.by_channel else None
        rounded = self.inner.fake_quant(w["weight"], scale, axis=along, path=path, to=form.to)
        bias = w.get("bias")
        return w.holding(weight=rounded) if bias is None else w.holding(weight=rounded, bias=bias)
