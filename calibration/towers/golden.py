"""What a build compares a tower in static INT8 with: a drawn picture in place of noise.

Steps of inputs come from images, and random pixels, the golden inputs of every bundle, have values
deep in the tower that no image brings: clipped to the images' ranges they say nothing about images.
So such a bundle has the pixels of a picture of soft colours, which is nobody's, and the float
tower's embedding of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgevlm.calibration.chain import Arithmetic, Passage
from edgevlm.calibration.towers.chain import TowerChain
from edgevlm.calibration.unfinished import Unfinished
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.goldens import Golden
from edgevlm.toolkit.checkpoints.layouts.source import TowerSource
from edgevlm.toolkit.images.preprocess import preprocess
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.vlm.components import EMBEDDING

_NAME = "golden.part"
_COLOURS, _SIZE = (9, 12, 3), (640, 480)


def with_picture(
    source: TowerSource,
    floats: Mapping[str, Mapping[str, Array]],
    chain: TowerChain,
    arithmetic: Arithmetic,
    kept: Unfinished,
) -> TowerSource:
    """The source with this golden, kept until its bundle is written; as it is where nothing is.

    floats: the float tower's weights.
    """
    if kept.folder is None:
        return source
    (part,) = chain.parts
    inputs = {"pixels": pixels_of(chain)[None]}
    found = Passage(floats, arithmetic).run(part, inputs)
    outputs = {EMBEDDING: goldens.sampled(found[EMBEDDING])}
    path = kept.folder / _NAME
    goldens.save(path, [Golden(part.name, inputs, outputs)])
    return TowerSource(source.model, source.weights, source.origin, source.plan, path)


def pixels_of(chain: TowerChain) -> Array:
    """The picture as the tower takes it, in eighths: exact in every float format."""
    from PIL import Image

    colours = np.random.default_rng(0).integers(0, 256, _COLOURS, np.uint8)
    picture = Image.fromarray(colours).resize(_SIZE, Image.Resampling.BICUBIC)
    rule = chain.model.images.encoders[chain.model.encoder.name]
    return np.asarray(np.round(preprocess(picture, rule) * 8) / 8, np.float32)
