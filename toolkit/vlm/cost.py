"""What a component costs, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from edgevlm.toolkit.ops.shape_ops import ShapeOps, Spec, Specs
from edgevlm.toolkit.ops.vocabulary import Weights
from edgevlm.toolkit.ops.wrappers import Count
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.components import Component
from edgevlm.toolkit.vlm.config import ModelConfig


def count(part: Component, axes: Mapping[str, int]) -> Count:
    """Run the component over shapes; `axes` gives every dimension that changes between calls."""
    counter = Count(ShapeOps(), part.name)
    part.forward(counter, Weights(Specs(part.shapes)), _inputs(part, axes))
    return counter


def image_axes(model: ModelConfig, views: int, placed: int) -> dict[str, int]:
    """All axes that change with an image: `views` of the size the encoders were published for,
    `placed` tokens of it in the prompt.
    """
    found = {"tiles": views, "placed": placed, "rows": 1, "batch": 1, "scored": 1}
    for encoder in model.encoders:
        height, width = model.images.encoders[encoder.name].size
        found |= {"height": height, "width": width}
        if isinstance(encoder.config.tokens, str):
            part = components.encoder_component(encoder)
            seen = outputs(part, found | {"tiles": 1})
            found["tokens"] = seen[part.outputs[0].name].shape[1]
    return found


def outputs(part: Component, axes: Mapping[str, int]) -> dict[str, Spec]:
    """Shapes of a component's outputs."""
    return part.forward(ShapeOps(), Weights(Specs(part.shapes)), _inputs(part, axes))


def _inputs(part: Component, axes: Mapping[str, int]) -> dict[str, Spec]:
    return {
        p.name: Spec(tuple(axes[n] if isinstance(n, str) else n for n in p.shape))
        for p in part.inputs
    }
