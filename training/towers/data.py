"""Images and their classes as the batches of a tower's training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from edgevlm.toolkit.errors import ConfigError, DataError, InputError
from edgevlm.toolkit.images import decode
from edgevlm.toolkit.images.preprocess import Preprocess, preprocess
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.training.data.broken import BAD_IMAGE, MISSING_IMAGE, BrokenSample
from edgevlm.training.data.image_samples import Found, Picture, class_names, numbered, open_images
from edgevlm.training.data.scan import Scan
from edgevlm.training.feed import Chosen, DataSet
from edgevlm.training.towers.augment import CLIP_MEAN, CLIP_STD, generator_of, training_pixels
from edgevlm.training.towers.ranks import FILLER
from edgevlm.training.vlm import Batch


@dataclass(frozen=True)
class ImageSet:
    """Images with the classes of each: labels int64 [images, l], -1 for none; None if unknown yet.

    num_classes: of the whole data, None if unknown yet.
    """

    found: Sequence[Found]
    labels: Array | None
    num_classes: int | None
    names: Sequence[str] = ()

    @property
    def usable(self) -> Array:
        """The numbers of the images that are no BrokenSample, int64."""
        return np.array([i for i, x in enumerate(self.found) if isinstance(x, Picture)], np.int64)

    def data(self) -> DataSet:
        """As the feed takes it: the usable ones, and what is broken already."""
        usable = self.usable
        broken = tuple(one for one in self.found if isinstance(one, BrokenSample))
        return DataSet(None, None, Scan(usable, np.zeros(len(usable), np.int64), broken), self.size)

    @property
    def size(self) -> int:
        """Images, the broken ones among them."""
        return len(self.found)


def open_set(
    paths: Sequence[str],
    images: str | None,
    label_file: str | None,
    *,
    clustered: bool = False,
    classes: Sequence[str] | None = None,
) -> ImageSet:
    """The images at `paths` with their classes: those of a label file, or of the data themselves.

    clustered: classes are made later. classes: the names that classes may have, those of the
    training data, for held-out images. Raises DataError.
    """
    folder = None if images is None else Path(images)
    found = [one for path in paths for one in open_images(Path(path), folder)]
    where = ", ".join(paths)
    if not any(isinstance(one, Picture) for one in found):
        raise DataError(f"{where} holds no images that can be used")
    if clustered:
        return ImageSet(found, None, None)
    if label_file is not None:
        labels = read_labels(Path(label_file), len(found), where)
        return ImageSet(found, labels, int(labels.max()) + 1)
    names = class_names(found) if classes is None else classes
    if not names or not any(one.classes for one in found if isinstance(one, Picture)):
        raise DataError(
            f"{where} does not say of which class an image is",
            hint="one sub-folder for each class, --labels FILE, or --classes K to cluster first",
        )
    found, labels = numbered(found, names)
    return ImageSet(found, labels, len(names), names)


def read_labels(path: Path, count: int, where: str) -> Array:
    """The label file of `count` images, as clustering.write_labels makes it: int64 [count, l].

    Raises DataError for another file.
    """
    try:
        labels = np.load(path)
    except (OSError, ValueError, EOFError) as broken:
        raise DataError(f"{path} holds no labels: {broken}") from None
    if labels.dtype.kind not in "iu" or labels.ndim not in (1, 2) or not labels.size:
        raise DataError(f"{path} holds {labels.dtype} {list(labels.shape)}, expected int [N, l]")
    if len(labels) != count:
        raise DataError(
            f"{path} has labels of {len(labels)} images, {where} holds {count}",
            hint="row i is for image i, in the order of the data",
        )
    if labels.min() < -1 or labels.max() < 0:
        raise DataError(f"{path} holds the label {labels.min()}, expected 0 or more, -1 for none")
    whole: Array = labels.reshape(count, -1).astype(np.int64)
    return whole


@dataclass(frozen=True)
class Pictures(Dataset[Any]):
    """Images as batches of at most `rows`, in the order asked for; broken ones are left out.

    A batch holds "pixels" [n, 3, size, size] of the n images that could be read, "labels" int64
    [rows, l], of which those behind the n are FILLER, "places" [n]: which of the chosen ones they
    are, and "images", the number n. Where fewer than `least` could be read, blank images stand
    behind them. In training each image is cropped at random, by (seed, epoch, its number) alone.
    """

    images: ImageSet
    size: int
    rows: int
    area: tuple[float, float]
    seed: int
    least: int = 1
    positives: int = 1

    def __getitem__(self, chosen: Chosen) -> tuple[Batch, list[BrokenSample]]:
        """The batch, and the faults of the images that cannot be read."""
        arrays, places, faults = [], [], []
        numbers = np.array(chosen.items, np.int64)
        for place, number in enumerate(numbers.tolist()):
            try:
                arrays.append(self._pixels(number, chosen.epoch))
                places.append(place)
            except BrokenSample as fault:
                faults.append(fault)
        labels = np.full((self.rows, self.positives), FILLER, np.int64)
        if self.images.labels is not None and places:
            labels[: len(places)] = -1
            own = self.images.labels[numbers[places], : self.positives]
            labels[: len(places), : own.shape[1]] = own
        while len(arrays) < self.least:
            arrays.append(np.zeros((3, self.size, self.size), np.float32))
        batch: dict[str, Tensor | int] = {
            "pixels": torch.from_numpy(np.stack(arrays)),
            "labels": torch.from_numpy(labels),
            "places": torch.tensor(places, dtype=torch.long),
            "images": len(places),
        }
        return batch, faults

    def _pixels(self, number: int, epoch: int | None) -> Array:
        picture = self.images.found[number]
        if isinstance(picture, BrokenSample):
            raise picture
        try:
            rgb = decode.load(picture.read()).rgb
        except InputError as unreadable:
            gone = isinstance(picture.place, Path) and not picture.place.is_file()
            kind = MISSING_IMAGE if gone else BAD_IMAGE
            raise BrokenSample(picture.name, kind, unreadable.message) from None
        size = (self.size, self.size)
        if epoch is None:
            return preprocess(rgb, evaluation_rule(self.size))
        generator = generator_of(self.seed, epoch, number)
        return training_pixels(rgb, size, generator, area=self.area)


def evaluation_rule(size: int) -> Preprocess:
    """How an image is shown where nothing is random: as CLIP's processor does."""
    return Preprocess("bicubic", 1 / 255, CLIP_MEAN, CLIP_STD, short_edge=size, crop=(size, size))


def with_labels(images: ImageSet, labels: Array, num_classes: int) -> ImageSet:
    """The images with labels int [usable, l] of those that are usable.

    Raises ConfigError if there are labels of another number of images.
    """
    usable = images.usable
    if len(labels) != len(usable):
        raise ConfigError(
            f"the labels are those of {len(labels)} images, the data hold {len(usable)}",
            hint="the data changed since they were clustered; begin another run",
        )
    whole = np.full((images.size, labels.shape[1]), -1, np.int64)
    whole[usable] = labels
    return replace(images, labels=whole, num_classes=num_classes)
