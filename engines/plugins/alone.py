"""Each fused op as a component by itself: what is built with its plugin, and without.

Its parameters are weights, as in a model, so that a builder may fold what it can of a body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgevlm.engines.plugins.catalogue import Site
from edgevlm.engines.plugins.layer_merge.spec import Attributes as LayerMerge
from edgevlm.engines.plugins.ms_deform_attn.spec import Attributes as MSDeformAttn
from edgevlm.engines.plugins.rotary.spec import Attributes as Rotary
from edgevlm.engines.plugins.trial import drawn, floats, stored
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Weights
from edgevlm.toolkit.vlm.components import Component, Port

NAME = "fused"  # of every such component
Values = Mapping[str, Array]
Body = Callable[[Ops[Any], Weights[Any], Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Alone:
    """A component of one op, random weights and inputs in float32, each a number of the format that
    the engine computes in, and what the reference makes of them.
    """

    component: Component
    weights: Values
    inputs: Values
    expected: Values


def alone(site: Site, dtype: str, generator: np.random.Generator) -> Alone:
    """A site's call, on random numbers."""
    values = drawn(site, generator)
    body, weights, inputs = _PARTS[site.op](site, values)
    weights, inputs = ({n: _rounded(a, dtype) for n, a in p.items()} for p in (weights, inputs))

    def forward(op: Ops[Any], w: Weights[Any], given: Mapping[str, Any]) -> dict[str, Any]:
        return {"y": body(op, w, given)}

    expected = forward(NumpyOps(), Weights(weights), inputs)
    shapes = {name: array.shape for name, array in weights.items()}
    ports = tuple(Port(name, "float", array.shape) for name, array in inputs.items())
    component = Component(NAME, forward, shapes, ports, (Port("y", "float", expected["y"].shape),))
    return Alone(component, weights, inputs, expected)


def _rounded(array: Array, dtype: str) -> Array:
    return floats(stored(array, dtype), dtype)


def _deform(site: Site, x: Values) -> tuple[Body, Values, Values]:
    at = site.at
    assert isinstance(at, MSDeformAttn)
    inputs = {name: x[name] for name in ("value", "offsets", "scores")}

    def body(op: Ops[Any], w: Weights[Any], given: Mapping[str, Any]) -> Any:
        return op.ms_deform_attn(
            *(given[name] for name in inputs),
            grid=(at.height, at.width),
            num_levels=at.levels,
            num_heads=at.num_heads,
            num_points=at.num_points,
            head_dim=at.head_dim,
            reference=x["reference"],
        )

    return body, {}, inputs


def _merge(site: Site, x: Values) -> tuple[Body, Values, Values]:
    at = site.at
    assert isinstance(at, LayerMerge)
    levels = {f"x.{i}": level for i, level in enumerate(np.split(x["x"], at.levels, axis=2))}
    names = {"norm.weight": "norm_weight", "norm.bias": "norm_bias", "scale": "scale"}
    names |= {"linear.weight": "weight", "linear.bias": "bias"}

    def body(op: Ops[Any], w: Weights[Any], given: Mapping[str, Any]) -> Any:
        return op.layer_merge([given[name] for name in levels], w, at.epsilon)

    return body, {ours: x[theirs] for ours, theirs in names.items()}, levels


def _rotary(site: Site, x: Values) -> tuple[Body, Values, Values]:
    """With the attention behind the rotation, as the plugin and its body have it in a model."""
    at = site.at
    assert isinstance(at, Rotary)
    sizes = {"num_heads": at.num_heads, "head_dim": at.head_dim}
    inputs = {"q": x["q"], "k": x["k"], "v": x["q"][:, ::-1]}

    def body(op: Ops[Any], w: Weights[Any], given: Mapping[str, Any]) -> Any:
        angles = op.constant("angles", x["angles"])
        return op.attention_rotary(given["q"], given["k"], given["v"], angles, **sizes)

    return body, {}, inputs


_PARTS: Mapping[str, Callable[[Site, Values], tuple[Body, Values, Values]]] = {
    "MSDeformAttn": _deform,
    "LayerMerge": _merge,
    "RotaryAttention": _rotary,
}
