"""Preprocessing for SAM: the longer side to one length, the rest of a square in zeros; and back.

Source: facebookresearch/segment-anything (ResizeLongestSide, Sam.preprocess, postprocess_masks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.images.resize import bilinear
from edgevlm.toolkit.images.tiling import Resample, pillow_filter
from edgevlm.toolkit.ops.vocabulary import Array

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class LongestSide:
    """A square image of `side` pixels. mean, std: of the bytes 0 to 255."""

    side: int
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    resample: Resample = "bilinear"

    def inner(self, size: Size) -> Size:
        """Height and width that an image of `size` has in the square; small ones are enlarged.

        Raises InputError for one so narrow that nothing would be left.
        """
        scale = self.side * 1.0 / max(size)
        height, width = int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)
        if min(height, width) < 1:
            raise InputError(
                f"an image of {size[1]} x {size[0]} pixels has none left in one of {self.side}",
                hint="cut it into pieces and give them as several images",
            )
        return height, width


def preprocess(image: Image, rule: LongestSide) -> Array:
    """Pixels of an RGB image, float32 [3, side, side].

    The image is in the upper left corner. What is beside it is 0 behind the normalisation: the mean
    colour.
    """
    height, width = rule.inner((image.height, image.width))
    resized = np.asarray(image.resize((width, height), pillow_filter(rule.resample)))
    mean, std = np.asarray(rule.mean, np.float32), np.asarray(rule.std, np.float32)
    table = (np.arange(256, dtype=np.float32)[:, None] - mean) / std
    pixels = np.zeros((3, rule.side, rule.side), np.float32)
    for channel in range(3):
        pixels[channel, :height, :width] = table[:, channel][resized[..., channel]]
    return pixels


def mask_logits(low: Array, rule: LongestSide, size: Size, shown: Size | None = None) -> Array:
    """A mask's logits [h, w] of the square as those of the image, float32 [height, width].

    Bilinear to the square's own side, cut to where an image of `size` is, bilinear to that size, or
    to `shown`.
    """
    square = bilinear(np.asarray(low, np.float32), (rule.side,) * 2, cut=rule.inner(size))
    return bilinear(square, shown or size)
