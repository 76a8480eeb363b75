"""Linears in int8_rows run in float: what they will give, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.calibration.chain import Arithmetic
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.quantization import channels
from edgevlm.toolkit.quantization.plan import PrecisionPlan


class RowQuantized(Wrapper[Any]):
    """Rounds the linears that a plan has in int8_rows: inputs by rows, weights by outputs.

    weights: the arrays by key, which are read once for their steps.
    """

    def __init__(
        self,
        inner: Ops[Any],
        component: str,
        plan: PrecisionPlan,
        weights: Mapping[str, Array],
        arithmetic: Arithmetic,
    ) -> None:
        super().__init__(inner, component)
        self._plan, self._weights, self._arithmetic = plan, weights, arithmetic
        self._steps: dict[str, Array] = {}

    def linear(self, x: Any, w: Weights[Any]) -> Any:
        if self._plan.at(self.path_of(w)) != "int8_rows":
            return self.inner.linear(x, w)
        key, by = w.key("weight"), self._arithmetic
        if key not in self._steps:
            self._steps[key] = channels.scales(self._weights[key])
        steps = self._steps[key]
        weight = self.inner.fake_quant(w["weight"], steps, axis=1, path=f"{w.path}/weight")
        rounded = by.load(channels.round_rows(by.read(x)))
        return self.inner.linear(rounded, w.replacing(weight=weight))
