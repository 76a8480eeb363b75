"""Random crops of training images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edgevlm.toolkit.images.preprocess import Preprocess, preprocess
from edgevlm.training.towers.augment import (
    CLIP_MEAN,
    CLIP_STD,
    generator_of,
    random_box,
    training_pixels,
)


@pytest.mark.parametrize("size", [(200, 200), (640, 480), (90, 300)])
def test_parts_lie_inside_and_have_the_stated_share(size: tuple[int, int]) -> None:
    generator = np.random.default_rng(1)
    shares, lefts = [], set()
    for _ in range(300):
        left, top, width, height = random_box(size, generator, (0.3, 0.6))
        assert 0 <= left <= size[0] - width
        assert 0 <= top <= size[1] - height
        assert 0.74 < width / height < 1.35
        shares.append(width * height / (size[0] * size[1]))
        lefts.add(left)
    if size != (90, 300):  # too narrow for most shares: its centre is taken
        assert min(shares) > 0.28
        assert max(shares) < 0.62
        assert len(lefts) > 50


@pytest.mark.parametrize("size", [(2, 200), (200, 2), (1, 1)])
def test_narrow_images_give_their_centre(size: tuple[int, int]) -> None:
    left, top, width, height = random_box(size, np.random.default_rng(1), (0.9, 1.0))
    assert min(width, height) >= 1
    assert abs(2 * left + width - size[0]) <= 1
    assert abs(2 * top + height - size[1]) <= 1


def test_an_image_of_an_epoch_always_gives_the_same_pixels() -> None:
    array = np.random.default_rng(2).integers(0, 256, (50, 70, 3), np.uint8)
    image = Image.fromarray(array)

    def pixels(epoch: int, number: int) -> bytes:
        found = training_pixels(image, (28, 42), generator_of(5, epoch, number))
        assert found.shape == (3, 28, 42)
        assert found.dtype == np.float32
        return bytes(found.tobytes())

    assert pixels(0, 3) == pixels(0, 3)
    assert len({pixels(epoch, number) for epoch in range(3) for number in range(3)}) == 9


def test_the_whole_image_is_plain_preprocessing_or_its_mirror() -> None:
    array = np.random.default_rng(2).integers(0, 256, (40, 40, 3), np.uint8)
    image = Image.fromarray(array)
    rule = Preprocess("bicubic", 1 / 255, CLIP_MEAN, CLIP_STD, exact=(40, 40))
    plain = preprocess(image, rule)
    seen = set()
    for number in range(60):
        found = training_pixels(image, (40, 40), generator_of(0, 0, number), area=(1.0, 1.0))
        seen |= {"plain"} if np.array_equal(found, plain) else set()
        seen |= {"mirror"} if np.array_equal(found, plain[:, :, ::-1]) else set()
    assert seen == {"plain", "mirror"}
    for number in range(20):
        found = training_pixels(
            image, (40, 40), generator_of(0, 0, number), area=(1.0, 1.0), flip=False
        )
        assert np.array_equal(found, plain)
