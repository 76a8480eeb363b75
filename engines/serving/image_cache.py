"""Feature rows of images by what the images show, so that a second question encodes nothing."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from edgevlm.engines.backends.tensors import Tensor, join
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.session import Session
from edgevlm.engines.runtime.vision import Features
from edgevlm.toolkit.images.decode import LoadedImage
from edgevlm.toolkit.ops.vocabulary import Array

_NAMES = 4096  # images whose number is remembered; 100 bytes each
_ROW_BYTES = 4  # of a value


@dataclass(frozen=True)
class EncodedImage:
    """number: the same for the same views of the same pixels, and for no others. indices: its
    tokens as rows [n, hidden_size].
    """

    number: int
    rows: Tensor
    indices: Array

    @property
    def nbytes(self) -> int:
        """Memory of the rows."""
        return _ROW_BYTES * int(math.prod(self.rows.shape))


class ImageCache:
    """Encodes images, and keeps the rows of those used last, up to `most_bytes`."""

    def __init__(self, session: Session, most_bytes: int) -> None:
        self._session, self._most = session, most_bytes
        self._kept: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._numbers: OrderedDict[bytes, int] = OrderedDict()
        self._next = 0
        self.nbytes = self.hits = self.misses = 0

    def encode(
        self, images: Sequence[LoadedImage], clock: Clock, *, tiles: bool
    ) -> tuple[Features, tuple[EncodedImage, ...]]:
        """Features of all images of a request, and each image by itself."""
        if not images:
            return self._session.encode((), clock), ()
        found = tuple(self._image(image, len(images), clock, tiles) for image in images)
        indices, start = [], 0
        for image in found:
            indices.append(image.indices + start)
            start += image.rows.shape[0]
        return Features(join([image.rows for image in found]), tuple(indices)), found

    def _image(self, image: LoadedImage, count: int, clock: Clock, tiles: bool) -> EncodedImage:
        with clock.time("image_digest"):
            name = _digest(image, tiles, several=count > 1)
        known = self._kept.get(name)
        if known is not None:
            self._kept.move_to_end(name)
            self.hits += 1
            return known
        self.misses += 1
        features = self._session.encode([image], clock, tiles=tiles, count=count)
        made = EncodedImage(self._number(name), features.rows, features.indices[0])
        self._keep(name, made)
        return made

    def _number(self, name: bytes) -> int:
        number = self._numbers.pop(name, None)
        if number is None:
            number, self._next = self._next, self._next + 1
        self._numbers[name] = number
        if len(self._numbers) > _NAMES:
            self._numbers.popitem(last=False)
        return number

    def _keep(self, name: bytes, image: EncodedImage) -> None:
        if image.nbytes > self._most:
            return
        self._kept[name] = image
        self.nbytes += image.nbytes
        while self.nbytes > self._most:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes


def _digest(image: LoadedImage, tiles: bool, *, several: bool) -> bytes:
    """Of everything that the views are made of: pixels, size, and how they are cut."""
    hashed = hashlib.blake2b(digest_size=32)
    hashed.update(repr((image.rgb.size, tiles, several)).encode())
    hashed.update(image.rgb.tobytes())
    return hashed.digest()
