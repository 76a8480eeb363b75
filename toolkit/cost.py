"""What a component costs, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from toolkit.models.vlm import Component
from toolkit.ops import Weights
from toolkit.shapes import ShapeOps, Spec, Specs
from toolkit.wrap import Count


def count(part: Component, axes: Mapping[str, int]) -> Count:
    """Run the component over shapes; `axes` gives every dimension that changes between calls."""
    counter = Count(ShapeOps(), part.name)
    inputs = {
        p.name: Spec(tuple(axes[n] if isinstance(n, str) else n for n in p.shape))
        for p in part.inputs
    }
    part.forward(counter, Weights(Specs(part.shapes)), inputs)
    return counter
