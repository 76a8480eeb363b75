"""Ops around ops: Observe calibrates, Count adds up costs (Quantize: toolkit/quantization).

A wrapper changes what it is about and passes everything else to the ops inside it, so the same
model function calibrates, trains with fake quantization, records Q/DQ and estimates its cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar, cast

from edgevlm.toolkit.ops import decompositions
from edgevlm.toolkit.ops.costs import COSTS, Cost, Parameter
from edgevlm.toolkit.ops.shape_ops import Spec
from edgevlm.toolkit.ops.vocabulary import Ops, R, Weights

T = TypeVar("T")


class Wrapper(Generic[T]):
    """Passes every op to `inner`; a subclass replaces some of them."""

    def __init__(self, inner: Ops[T], component: str) -> None:
        self.inner = inner
        self.component = component

    def __getattr__(self, op: str) -> Any:
        return getattr(self.inner, op)

    def block(self, function: Callable[..., R], w: Weights[T], *args: Any) -> R:
        """Run by the ops inside, but through this wrapper: it sees every op of the layer."""
        return self.inner.block(lambda _, w, *args: function(self, w, *args), w, *args)

    def layer_merge(self, xs: Sequence[T], w: Weights[T], eps: float) -> T:
        """Decomposed through this wrapper, so that it sees the linear inside."""
        op: Ops[T] = cast(Any, self)
        return decompositions.layer_merge(op, xs, w, eps)

    def path_of(self, w: Weights[Any]) -> str:
        """The path with its component in front: lm/layers.3/attention/q."""
        return f"{self.component}/{w.path}"


class Observe(Wrapper[T]):
    """Runs the model and shows what enters each linear and conv: see(path, x), x [..., in] or
    [B, C, H, W].
    """

    def __init__(self, inner: Ops[T], component: str, see: Callable[[str, T], None]) -> None:
        super().__init__(inner, component)
        self._see = see

    def linear(self, x: T, w: Weights[T]) -> T:
        self._see(self.path_of(w), x)
        return self.inner.linear(x, w)

    def conv(self, x: T, w: Weights[T], **sizes: int) -> T:
        self._see(self.path_of(w), x)
        return self.inner.conv(x, w, **sizes)


class Count(Wrapper[Spec]):
    """Runs the model over shapes and lists what each op costs.

    Weights have to be `costs.Parameter` shapes, or they count as activations. `tables`: shapes
    of the constants by name, which the weights file holds once each. Raises KeyError with the
    name of an op that has no entry in `costs.COSTS`.
    """

    def __init__(self, inner: Ops[Spec], component: str) -> None:
        super().__init__(inner, component)
        self.costs: list[Cost] = []
        self.tables: dict[str, Spec] = {}
        self._path = component

    def __getattr__(self, op: str) -> Any:
        run = getattr(self.inner, op)

        def counted(*args: Any, **options: Any) -> Any:
            result = run(*args, **options)
            self._add(op, args, options, result)
            if isinstance(result, Spec):
                return _kind_of(op, args, result)
            return tuple(Spec(y.shape) for y in result)

        return counted

    def layer_merge(self, xs: Sequence[Spec], w: Weights[Spec], eps: float) -> Spec:
        """The ops inside; the product is of an op of its own, as plans of weights alone leave its
        matrix in float.
        """
        first = len(self.costs)
        y = super().layer_merge(xs, w, eps)
        self.costs[first:] = [
            replace(c, op="layer_merge") if c.matrix_elements else c for c in self.costs[first:]
        ]
        return y

    def _add(self, op: str, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        weights = [arg for arg in args if isinstance(arg, Weights)]
        if weights:
            self._path = self.path_of(weights[0])
        if op == "constant":
            self.tables[args[0]] = result
        cost = COSTS[op](result, *args, **options)
        self.costs.append(replace(cost, op=op, path=self._path))

    @property
    def flops(self) -> int:
        """Floating-point operations of everything run so far."""
        return sum(cost.flops for cost in self.costs)


def _kind_of(op: str, operands: Sequence[Any], y: Spec) -> Spec:
    """The result as a Parameter if it is still a tensor of the weights file, else as a Spec."""
    view = op == "reshape" and isinstance(operands[0], Parameter)
    return Parameter(y.shape) if view or op == "constant" else Spec(y.shape)
