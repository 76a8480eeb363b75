"""The masks of a sample, for models that make them: which token each belongs to, and its image.

As in deepglint/unicom (mlcd_vl/downstream): `segmentation` is a list of COCO's run lengths, one for
each [SEG] of the conversation, all of one size. Of k images, image i gets tokens i, i + k, ...; the
list is in the order of images. A sample without the key has no masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.images import decode, longest_side, rle
from edgevlm.toolkit.images.longest_side import LongestSide, Size
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.training.data.broken import BAD_MASK, BrokenSample
from edgevlm.training.data.samples import RawSample

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MaskRules:
    """token: the id of [SEG]. pixels: how the encoder of masks sees an image."""

    token: int
    pixels: LongestSide
    upright: bool = True


@dataclass(frozen=True)
class SampleMask:
    """One mask. image: among `SampleMasks.pixels`; place: the position of its token; inner: the
    image's height and width among the pixels; target: bool [height, width].
    """

    image: int
    place: int
    inner: Size
    target: Array


@dataclass(frozen=True)
class SampleMasks:
    """The masks of a sample, and the pixels of the images that have some."""

    pixels: tuple[Array, ...] = ()
    masks: tuple[SampleMask, ...] = ()


def of_sample(raw: RawSample, ids: Array, rows: Array, rules: MaskRules) -> SampleMasks:
    """The masks of a sample whose positions hold `ids` and feature rows `rows` (-1 for text).

    Masks beyond the tokens are left out, as in the original. Raises BrokenSample for fewer masks
    than tokens, other forms, and sizes that are no image's.
    """
    if raw.masks is None:
        return SampleMasks()
    targets = _decoded(raw.name, raw.masks)
    places = np.flatnonzero((ids == rules.token) & (rows < 0))
    if len(targets) < len(places):
        reason = f"{len(places)} tokens of masks, {len(targets)} in segmentation"
        raise BrokenSample(raw.name, BAD_MASK, reason)
    count, found, pixels, sizes = len(raw.images), list[SampleMask](), list[Array](), list[Size]()
    if not count and len(places):
        raise BrokenSample(raw.name, BAD_MASK, "masks without an image")
    for number in range(count):
        own = places[number::count]
        if not len(own):
            continue
        rgb = decode.load(raw.images[number], upright=rules.upright).rgb
        size = (rgb.height, rgb.width)
        sizes.append(size)
        for place in own:
            target = targets[len(found)]
            mask = SampleMask(len(pixels), int(place), rules.pixels.inner(size), target)
            found.append(mask)
        pixels.append(longest_side.preprocess(rgb, rules.pixels))
    for mask in found:
        if mask.target.shape not in sizes:
            reason = f"a mask of {mask.target.shape} for an image of {sizes[mask.image]}"
            raise BrokenSample(raw.name, BAD_MASK, reason)
    return SampleMasks(tuple(pixels), tuple(found))


def _decoded(name: str, stated: Any) -> list[Array]:
    """The masks of `segmentation`: run lengths, or a list of them for each image."""
    if not isinstance(stated, Sequence) or isinstance(stated, str):
        raise BrokenSample(name, BAD_MASK, f"segmentation is {stated!r:.40}, expected a list")
    flat: list[Any] = []
    for item in stated:
        flat += item if isinstance(item, (list, tuple)) else [item]
    found = []
    for item in flat:
        try:
            if not isinstance(item, Mapping):
                raise InputError(f"{item!r:.40} is no object of size and counts")
            found.append(rle.decode(item))
        except InputError as odd:
            raise BrokenSample(name, BAD_MASK, odd.message) from None
    return found


def collate(samples: Sequence[SampleMasks], score: Sequence[Array], rules: MaskRules) -> Any:
    """What a batch has for masks; B samples, N masks, I images that have some.

    score: for each sample the positions whose states are computed; those of masks are its last.

    - "mask_pixels": float32 [I, 3, side, side]; one of zeros if there is none.
    - "mask_states": int64 [N, 2], the sample and the column of `score`; N is at least 1.
    - "mask_images": int64 [N], the row of "mask_pixels".
    - "mask_targets": of each mask its target, bool, and the image's height and width among pixels;
      none if N is that of a mask that nothing is learned from.
    """
    pixels: list[Array] = []
    states: list[tuple[int, int]] = []
    images: list[int] = []
    targets: list[tuple[torch.Tensor, Size]] = []
    for number, (sample, scored) in enumerate(zip(samples, score, strict=True)):
        first = len(scored) - len(sample.masks)
        for offset, mask in enumerate(sample.masks):
            states.append((number, first + offset))
            images.append(len(pixels) + mask.image)
            targets.append((_tensor(mask.target), mask.inner))
        pixels += sample.pixels
    side = rules.pixels.side
    return {
        "mask_pixels": _tensor(np.stack(pixels or [np.zeros((3, side, side), np.float32)])),
        "mask_states": _tensor(np.asarray(states or [(0, 0)], np.int64)),
        "mask_images": _tensor(np.asarray(images or [0], np.int64)),
        "mask_targets": targets,
    }


def _tensor(array: Array) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))
