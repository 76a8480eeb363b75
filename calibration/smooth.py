"""SmoothQuant: channels with outliers are made smaller, and the weights that read them larger.

Xiao et al., arXiv 2211.10438: channel j of a norm's output is divided by
s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), which goes into the norm's weight and bias, and row j
of every linear that reads it is multiplied by s_j. In float the model stays the same. So it does
where a linear reads silu(gate) * up: there s goes into the columns of `up`. Language models have
their largest values there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from edgevlm.toolkit.ops.shape_ops import ShapeOps, Spec, Specs
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.vlm import cost
from edgevlm.toolkit.vlm.components import Component

_SMALLEST = 1e-5  # of a scale: a channel that is nearly silent is not made loud


@dataclass
class Link:
    """A norm whose output nothing but linears read, or a linear behind whose SwiGLU they stand.

    source: what its keys begin with. linears: the keys of the weights that read it; paths: of those
    layers, all of which have the same input. through: the tensor in between, by id.
    """

    source: str
    paths: list[str] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)
    through: int | None = None


class Trace(Wrapper[Spec]):
    """Runs a component over shapes, and sees where outputs of norms and linears go.

    Tensors are known by their ids: each of these is an object of its own, and kept.
    """

    def __init__(self, component: Component) -> None:
        super().__init__(cast(Any, ShapeOps()), component.name)
        self._keys = component.shapes.keys()
        self._sources: dict[int, tuple[Spec, Link]] = {}
        self._products: dict[int, tuple[Spec, str]] = {}
        self._kept: list[Spec | None] = []
        self._spoiled: set[int] = set()
        self._uses: Counter[str] = Counter()

    def __getattr__(self, op: str) -> Any:
        run = getattr(self.inner, op)

        def traced(*args: Any, **options: Any) -> Any:
            self._spoil([*args, *options.values()])
            return run(*args, **options)

        return traced

    def layer_merge(self, xs: Sequence[Spec], w: Weights[Spec], eps: float) -> Spec:
        """As one op: its norms and its linear stay as they are."""
        self._spoil(xs)
        return self.inner.layer_merge(xs, w, eps)

    def layer_norm(self, x: Spec, w: Weights[Spec], eps: float) -> Spec:
        return self._normed(x, w, self.inner.layer_norm(x, w, eps))

    def rms_norm(self, x: Spec, w: Weights[Spec], eps: float) -> Spec:
        return self._normed(x, w, self.inner.rms_norm(x, w, eps))

    def linear(self, x: Spec, w: Weights[Spec]) -> Spec:
        key, y = w.key("weight"), self._own(self.inner.linear(x, w))
        self._uses[key] += 1
        known = self._sources.get(id(x))
        if known is None or key not in self._keys:  # or made by another op
            self._spoil([x])
        else:
            known[1].paths.append(self.path_of(w))
            known[1].linears.append(key)
        self._products[id(y)] = (y, w.key(""))
        return y

    def swiglu(self, gate: Spec, up: Spec) -> Spec:
        y, product = self._own(self.inner.swiglu(gate, up)), self._products.pop(id(up), None)
        self._spoil([gate] if product else [gate, up])
        if product is not None:
            self._source(y, product[1], product[0])
        return y

    def _normed(self, x: Spec, w: Weights[Spec], y: Spec) -> Spec:
        self._spoil([x])
        y = self._own(y)
        self._uses[w.key("weight")] += 1
        self._source(y, w.key(""), None)
        return y

    def _own(self, y: Spec) -> Spec:
        """The same as an object of its own; its id may be that of something that is gone."""
        y = Spec(y.shape)
        self._spoiled.discard(id(y))
        return y

    def _source(self, y: Spec, prefix: str, through: Spec | None) -> None:
        if prefix + "weight" in self._keys:
            self._kept.append(through)
            link = Link(prefix, through=None if through is None else id(through))
            self._sources[id(y)] = (y, link)

    def _spoil(self, values: Iterable[Any]) -> None:
        """These are read by something that is no linear."""
        for value in values:
            if isinstance(value, (list, tuple)):
                self._spoil(value)
            self._spoiled.add(id(value))

    def links(self, outputs: Iterable[Spec]) -> list[Link]:
        """Where outliers can be moved; outputs: of the component."""
        self._spoil(outputs)
        whole = (link for key, (_, link) in self._sources.items() if key not in self._spoiled)
        return [
            link
            for link in whole
            if link.linears
            and link.through not in self._spoiled
            and all(self._uses[key] == 1 for key in (link.source + "weight", *link.linears))
        ]


def links(component: Component, axes: Mapping[str, int]) -> list[Link]:
    """Where outliers of a component can be moved; axes: any sizes that it can run with."""
    trace: Any = Trace(component)
    inputs = cost.inputs(component, axes)
    outputs = component.forward(trace, Weights(Specs(component.shapes)), inputs)
    found: list[Link] = trace.links(outputs.values())
    return found


def scales(link: Link, largest: Array, weights: Mapping[str, Array], alpha: float) -> Array:
    """s [inputs] of a link, float32; largest: max|x| of each channel that they read."""
    rows = np.max([np.abs(weights[key].astype(np.float32)).max(1) for key in link.linears], 0)
    loud = (largest > 0) & (rows > 0)
    found = np.where(loud, largest, 1.0) ** alpha / np.where(loud, rows, 1.0) ** (1 - alpha)
    return np.where(loud, np.maximum(found, _SMALLEST), 1.0).astype(np.float32)


class Changed(Mapping[str, Array]):
    """The weights of a component, some of them changed when they are read."""

    def __init__(
        self, weights: Mapping[str, Array], changes: Mapping[str, Callable[[Array], Array]]
    ) -> None:
        self._weights = weights
        self._changes = changes

    def __getitem__(self, key: str) -> Array:
        array, change = self._weights[key], self._changes.get(key)
        return array if change is None else change(array.astype(np.float32))

    def __contains__(self, key: object) -> bool:
        return key in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def smoothed(
    weights: Mapping[str, Array], found: Mapping[str, Array], linked: Sequence[Link]
) -> Changed:
    """The weights with the scales `found`, by a link's source, in sources and linears."""
    columns: dict[str, Array] = {}
    rows: dict[str, Array] = {}
    for link in linked:
        columns |= {link.source + leaf: found[link.source] for leaf in ("weight", "bias")}
        rows |= dict.fromkeys(link.linears, found[link.source])

    def change(key: str) -> Callable[[Array], Array]:
        def scaled(array: Array) -> Array:
            if key in columns:
                array = array / columns[key]
            return array * rows[key][:, None] if key in rows else array

        return scaled

    return Changed(weights, {key: change(key) for key in columns | rows})
