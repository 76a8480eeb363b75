"""An image as a model sees it: the pixels of its views for every encoder, the order of its tokens.

Running an engine and training share this, so that a model is trained on what it will see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevlm.toolkit.images import preprocess, tiling
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.images.tiling import ArrangedTokens, Views
from edgevlm.toolkit.ops.vocabulary import Array

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PreparedImage:
    """The views of one image.

    pixels: for each view, float32 [3, height, width] by the encoder's name. order: the tokens as
    rows of this image's features, see tiling.arrange; None for view after view.
    """

    pixels: tuple[Mapping[str, Array], ...]
    order: ArrangedTokens | None


def prepare(image: Image, rules: ImageRules, *, count: int, tiles: bool = True) -> PreparedImage:
    """The views of an RGB image that comes with `count` - 1 others.

    tiles: whether it is cut into tiles if the rules have a tiling.
    """
    views, encoders = Views((image,), None), rules.encoders
    if rules.tiling is not None and tiles:
        if count > 1 and rules.tiling.several == "pad":
            encoders = {name: rule.padded() for name, rule in encoders.items()}
        else:
            views = tiling.cut(image, rules.tiling)
    pixels = tuple(
        {name: preprocess.preprocess(view, rule) for name, rule in encoders.items()}
        for view in views.images
    )
    order = None
    if rules.arrangement is not None:
        order = tiling.arrange(rules.arrangement, len(views.images), views.grid, image.size)
    return PreparedImage(pixels, order)
