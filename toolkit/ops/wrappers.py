"""Ops around ops: Observe calibrates, Count adds up costs (Quantize: toolkit/quantization).

A wrapper changes what it is about and passes everything else to the ops inside it, so the same
model function calibrates, trains with fake quantization, records Q/DQ and estimates its cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np

from edgevlm.toolkit.ops import decompositions
from edgevlm.toolkit.ops.shape_ops import Spec
from edgevlm.toolkit.ops.vocabulary import Array, Ops, R, Weights

T = TypeVar("T")


class Wrapper(Generic[T]):
    """Passes every op to `inner`; a subclass replaces the ops it cares about."""

    def __init__(self, inner: Ops[T], component: str) -> None:
        self.inner = inner
        self.component = component

    def __getattr__(self, op: str) -> Any:
        return getattr(self.inner, op)

    def block(self, function: Callable[..., R], w: Weights[T], *args: Any) -> R:
        """Run by the ops inside, but through this wrapper: it sees every op of the layer."""
        return self.inner.block(lambda _, w, *args: function(self, w, *args), w, *args)

    def layer_merge(self, xs: Sequence[T], w: Weights[T], eps: float) -> T:
        """In simpler ops through this wrapper, so that it meets the linear inside."""
        op: Ops[T] = cast(Any, self)
        return decompositions.layer_merge(op, xs, w, eps)

    def path_of(self, w: Weights[Any]) -> str:
        """The path with its component in front: lm/layers.3/attention/q."""
        return f"{self.component}/{w.path}"


class Observe(Wrapper[Array]):
    """Runs the model and keeps the largest |x| that entered each linear and conv."""

    def __init__(self, inner: Ops[Array], component: str) -> None:
        super().__init__(inner, component)
        self.largest: dict[str, float] = {}

    def linear(self, x: Array, w: Weights[Array]) -> Array:
        self._see(x, w)
        return self.inner.linear(x, w)

    def conv(self, x: Array, w: Weights[Array], **sizes: int) -> Array:
        self._see(x, w)
        return self.inner.conv(x, w, **sizes)

    def _see(self, x: Array, w: Weights[Array]) -> None:
        path = self.path_of(w)
        self.largest[path] = max(self.largest.get(path, 0.0), float(np.abs(x).max()))


@dataclass(frozen=True)
class Cost:
    """One op's work: multiply-adds count as two; weights and activations in elements moved."""

    op: str
    path: str
    flops: int
    weight_elements: int
    activation_elements: int


class Count(Wrapper[Spec]):
    """Runs the model over shapes and lists what each op costs."""

    def __init__(self, inner: Ops[Spec], component: str) -> None:
        super().__init__(inner, component)
        self.costs: list[Cost] = []
        self._path = component

    def __getattr__(self, op: str) -> Any:
        run = getattr(self.inner, op)

        def counted(*args: Any, **options: Any) -> Any:
            result = run(*args, **options)
            self._add(op, args, result, options)
            return result

        return counted

    def _add(self, op: str, args: tuple[Any, ...], result: Any, options: dict[str, Any]) -> None:
        weights = [arg for arg in args if isinstance(arg, Weights)]
        if weights:
            self._path = self.path_of(weights[0])
        outputs = [result] if isinstance(result, Spec) else list(result)
        flops = _FLOPS.get(op, _elementwise)(args, outputs, options)
        if op in _FREE:
            return
        moved = [*(a for a in args if isinstance(a, Spec)), *outputs[:1]]
        held = sum(weights[0][leaf].size for leaf in ("weight",)) if weights else 0
        if op == "embed":
            held = outputs[0].size  # a gather reads the rows it returns, not the table
        self.costs.append(Cost(op, self._path, flops, held, sum(s.size for s in moved)))

    @property
    def flops(self) -> int:
        """Floating-point operations of everything run so far."""
        return sum(cost.flops for cost in self.costs)


def _elementwise(args: Iterable[Any], outputs: list[Spec], options: dict[str, Any]) -> int:
    return outputs[0].size


def _linear(args: tuple[Any, ...], outputs: list[Spec], options: dict[str, Any]) -> int:
    x: Spec = args[0]
    return 2 * x.size * outputs[0].shape[-1]


def _conv(args: tuple[Any, ...], outputs: list[Spec], options: dict[str, Any]) -> int:
    weight: Spec = args[1]["weight"]
    return 2 * outputs[0].size * (weight.size // weight.shape[0])


def _attention(args: tuple[Any, ...], outputs: list[Spec], options: dict[str, Any]) -> int:
    q: Spec = args[0]
    k: Spec = args[1]
    return 4 * q.size * k.shape[1]


def _attention_cached(args: tuple[Any, ...], outputs: list[Spec], options: dict[str, Any]) -> int:
    """Causal: the first of S tokens sees T - S + 1 rows of the cache, the last one all T."""
    q: Spec = args[0]
    past: tuple[Spec, Spec] = args[3]
    length, rows = q.shape[1], past[0].shape[2]
    return int(4 * q.size * (rows - (length - 1) / 2))


_FREE = frozenset({"reshape", "transpose", "slice", "constant", "positions"})
_FLOPS: dict[str, Callable[[tuple[Any, ...], list[Spec], dict[str, Any]], int]] = {
    "linear": _linear,
    "unembed": _linear,
    "conv": _conv,
    "attention": _attention,
    "attention_cached": _attention_cached,
    **dict.fromkeys(_FREE, lambda args, outputs, options: 0),
}
