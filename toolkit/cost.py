"""What a component costs, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from toolkit.config import ModelConfig
from toolkit.models import vlm
from toolkit.models.vlm import Component
from toolkit.ops import Weights
from toolkit.shapes import ShapeOps, Spec, Specs
from toolkit.wrap import Count


def count(part: Component, axes: Mapping[str, int]) -> Count:
    """Run the component over shapes; `axes` gives every dimension that changes between calls."""
    counter = Count(ShapeOps(), part.name)
    part.forward(counter, Weights(Specs(part.shapes)), _inputs(part, axes))
    return counter


def picture_axes(model: ModelConfig, views: int, placed: int) -> dict[str, int]:
    """All axes that change with a picture: `views` of the size the encoders were published for,
    `placed` tokens of it in the prompt.
    """
    found = {"tiles": views, "placed": placed, "rows": 1, "batch": 1, "scored": 1}
    for encoder in model.encoders:
        height, width = model.images.encoders[encoder.name].size
        found |= {"height": height, "width": width}
        if isinstance(encoder.config.tokens, str):
            part = vlm.encoder_component(encoder)
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
