"""Images through a vision tower by itself: its embedding, and what its last block gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgevlm.calibration.chain import PIXELS, Found, Passage
from edgevlm.calibration.pictures import Sample
from edgevlm.toolkit.images import decode
from edgevlm.toolkit.images.preprocess import preprocess
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.components import EMBEDDING, Component, Port
from edgevlm.toolkit.vlm.towers import TowerConfig

FEATURES = "features"  # what the last block gives, of which the embedding is made


class _LastBlock(Wrapper[Any]):
    """Keeps what the block that ran last gave."""

    last: Any = None

    def block(self, function: Callable[..., Any], w: Weights[Any], *args: Any) -> Any:
        self.last = super().block(function, w, *args)
        return self.last


class TowerChain:
    """A tower's one component, run on samples as calibration runs a whole model's: chain.Chain."""

    def __init__(self, model: TowerConfig) -> None:
        self.model = model
        self.parts = components.components(model)
        self._watched = _watched(self.parts[0])

    def run_all(
        self,
        samples: Sequence[Sample],
        by: Passage,
        *,
        language: bool = False,
        answers: Sequence[Array] | None = None,
    ) -> list[Found]:
        """For each sample the embedding [1, channels], by the component's name, and under FEATURES
        what the last block gives. language, answers: of a whole model.
        """
        pixels = np.stack([self.pixels(sample) for sample in samples])
        step = max(PIXELS // math.prod(pixels.shape[-2:]), 1)
        found = list[Found]()
        for start in range(0, len(pixels), step):
            outputs = by.run(self._watched, {"pixels": pixels[start : start + step]})
            embeddings, features = outputs[EMBEDDING], outputs[FEATURES]
            found += [
                {
                    self.parts[0].name: {EMBEDDING: embeddings[i : i + 1]},
                    FEATURES: {FEATURES: features[i : i + 1]},
                }
                for i in range(len(embeddings))
            ]
        return found

    def answered(self, samples: Sequence[Sample], by: Passage) -> list[Array]:
        """Nothing is said to any sample."""
        return [np.zeros(0, np.int64) for _ in samples]

    def pixels(self, sample: Sample) -> Array:
        """An image as the tower takes it, float32 [3, height, width]."""
        assert sample.image is not None
        images = self.model.images
        rule = images.encoders[self.model.encoder.name]
        image = decode.load(sample.image, upright=images.upright, own_mode=rule.rgb_last)
        return preprocess(image.rgb, rule)


def _watched(part: Component) -> Component:
    """The component with FEATURES as one more output."""

    def forward(op: Any, w: Weights[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        seen: Any = _LastBlock(op, part.name)
        return {**part.forward(seen, w, inputs), FEATURES: seen.last}

    return replace(part, forward=forward, outputs=(*part.outputs, Port(FEATURES, "float", ())))
