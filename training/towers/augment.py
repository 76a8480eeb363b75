"""Random crops and flips for training towers, with Pillow and NumPy alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.toolkit.images.preprocess import Preprocess, preprocess
from edgevlm.toolkit.ops.vocabulary import Array

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_ASPECTS = (3 / 4, 4 / 3)
_TRIES = 10


def generator_of(seed: int, epoch: int, number: int) -> np.random.Generator:
    """For one image of one epoch: what it draws does not depend on workers, batches or restarts."""
    return np.random.default_rng([seed, epoch, number])


def training_pixels(
    image: Image,
    size: tuple[int, int],
    generator: np.random.Generator,
    *,
    area: tuple[float, float] = (0.4, 1.0),
    flip: bool = True,
) -> Array:
    """A random part of an RGB image, maybe mirrored: float32 [3, height, width], CLIP's mean, std.

    The part has a random share of the area within `area` and an aspect within 3:4 to 4:3 (Szegedy
    et al., arXiv 1409.4842) and is resized to (height, width) by bicubic filtering.
    """
    from PIL import Image as Pillow

    left, top, width, height = random_box(image.size, generator, area)
    box = (left, top, left + width, top + height)
    part = image.resize(size[::-1], Pillow.Resampling.BICUBIC, box=box)
    if flip and generator.random() < 0.5:
        part = part.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT)
    rule = Preprocess("bicubic", 1 / 255, CLIP_MEAN, CLIP_STD, exact=size)
    return preprocess(part, rule)


def random_box(
    size: tuple[int, int], generator: np.random.Generator, area: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random part of an image of `size` (width, height).

    An image too narrow for what was drawn ten times gives its centre, at the nearest aspect.
    """
    width, height = size
    for _ in range(_TRIES):
        wanted = width * height * generator.uniform(*area)
        aspect = math.exp(generator.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
        w, h = round(math.sqrt(wanted * aspect)), round(math.sqrt(wanted / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.integers((width - w + 1, height - h + 1))
            return int(left), int(top), w, h
    w = min(width, max(round(height * _ASPECTS[1]), 1))
    h = min(height, max(round(width / _ASPECTS[0]), 1))
    return (width - w) // 2, (height - h) // 2, w, h
