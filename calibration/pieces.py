"""Weights too large to be held in float whole: UNICOM's head has one of 604 million.

They stay where they are stored, and products add up over some of the inputs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from edgevlm.toolkit.ops.vocabulary import Array, EightBits, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper

LARGEST = 1 << 27  # weights that become one tensor
_AT_A_TIME = 1 << 24


@dataclass(frozen=True)
class Large:
    """A weight [inputs, outputs] as its file has it; make: from some of its rows to a tensor."""

    array: Array
    make: Callable[[Array], Any]


def loaded(weights: Mapping[str, Array], key: str, load: Callable[[Array], Any]) -> Any:
    """A weight as a tensor, or as Large where it is a large matrix."""
    array = weights[key]
    large = array.ndim == 2 and array.size >= LARGEST and key.endswith(".weight")
    return Large(array, load) if large else load(array)


class InPieces(Wrapper[Any]):
    """Multiplies by Large weights, and rounds them; all others go to the ops inside."""

    def linear(self, x: Any, w: Weights[Any]) -> Any:
        """x [..., K] by a Large weight [K, N], some of its rows at a time: [..., N]."""
        weight = w["weight"]
        if not isinstance(weight, Large):
            return self.inner.linear(x, w.replacing(weight=weight))
        count, bias, total = len(weight.array), w.get("bias"), None
        step = max(_AT_A_TIME // weight.array.shape[1], 1)
        for start in range(0, count, step):
            end = min(start + step, count)
            rows = {"weight": weight.make(weight.array[start:end])}
            if end == count and bias is not None:
                rows["bias"] = bias
            part = self.inner.slice(x, len(x.shape) - 1, start, end)
            product = self.inner.linear(part, w.holding(**rows))
            total = product if total is None else self.inner.add(total, product)
        return total

    def fake_quant(
        self, x: Any, scale: Array, *, axis: int | None, path: str, to: EightBits = "int8"
    ) -> Any:
        """Of a Large weight by outputs, or in one step: when its rows are made."""
        rounded = partial(self.inner.fake_quant, scale=scale, axis=axis, path=path, to=to)
        if not isinstance(x, Large):
            return rounded(x)
        assert axis != 0  # a step per row would have to be cut with the rows
        make = x.make
        return replace(x, make=lambda rows: rounded(make(rows)))

    def embed(self, ids: Any, w: Weights[Any]) -> Any:
        return self.inner.embed(ids, _whole(w))

    def unembed(self, x: Any, w: Weights[Any]) -> Any:
        return self.inner.unembed(x, _whole(w))


def _whole(w: Weights[Any]) -> Weights[Any]:
    """With a table that is not cut: what reads one takes it by rows, or multiplies by them."""
    table = w["weight"]
    return w.replacing(weight=table.make(table.array) if isinstance(table, Large) else table)
