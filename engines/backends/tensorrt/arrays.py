"""Arrays on a card, and TensorRT's number formats as NumPy stores them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgevlm.engines.backends.tensorrt.card import Block, Card
from edgevlm.toolkit.checkpoints.safetensors_io import from_bfloat16, to_bfloat16
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.ops.vocabulary import Array

Shape = tuple[int, ...]
ROW_AXES = ("batch", "tiles")  # of inputs and outputs: their rows do not depend on one another
# By the names of trt.DataType; bfloat16, which NumPy lacks, as its bits.
_STORED = {"FLOAT": "<f4", "HALF": "<f2", "BF16": "<u2", "INT64": "<i8", "INT32": "<i4"}


def stored(kind: str) -> np.dtype[np.generic]:
    """How NumPy stores a format. Raises UnsupportedError for those that no port of ours has."""
    if kind not in _STORED:
        raise UnsupportedError(f"an engine with inputs or outputs of TensorRT's type {kind}")
    return np.dtype(_STORED[kind])


def size(kind: str, shape: Shape) -> int:
    """Bytes of an array."""
    return math.prod(shape) * stored(kind).itemsize


def write(target: Array, values: Array, kind: str) -> None:
    """Store values, in the corner of a larger target; the rest becomes 0."""
    if target.shape != values.shape:
        target[...] = 0
        target = target[tuple(slice(n) for n in values.shape)]
    target[...] = to_bfloat16(values) if kind == "BF16" else values


def read(source: Array, kind: str) -> Array:
    """A copy of stored values: float32, or integers as they are."""
    if kind == "BF16":
        return from_bfloat16(source)
    return source.astype(np.float32) if kind == "HALF" else source.copy()


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """An array on a card, which it keeps alive. kind: its format, a name of trt.DataType.

    stride: bytes from one row of the first axis to the next; 0 where they lie side by side.
    """

    card: Card
    block: Block
    kind: str
    shape: Shape
    offset: int = 0
    stride: int = 0

    @property
    def pointer(self) -> int:
        """Its address. Raises InputError where the memory was freed with the session."""
        return self.block.address + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return size(self.kind, self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether nothing lies between its rows."""
        return self.stride in (0, size(self.kind, self.shape[1:]))

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Some rows of the first axis, in the same memory."""
        first, end, step = rows.indices(self.shape[0])
        assert step == 1
        row = self.stride or size(self.kind, self.shape[1:])
        shape, at = (max(end - first, 0), *self.shape[1:]), self.offset + first * row
        return DeviceArray(self.card, self.block, self.kind, shape, at, self.stride)

    def copy_row(self, source: int, target: int) -> None:
        """Make a row of the first axis what another is."""
        self.card.use()
        to, origin = (self[row : row + 1] for row in (target, source))
        self.card.copy(to.pointer, origin.pointer, origin.nbytes)

    def exchange_rows(self, a: int, b: int) -> None:
        """Make each of two rows of the first axis what the other was."""
        self.card.use()
        first, second = (self[row : row + 1] for row in (a, b))
        self.card.exchange(first.pointer, second.pointer, first.nbytes)

    def joined(self, others: Sequence[DeviceArray]) -> DeviceArray:
        """This and others, one after the other on the first axis."""
        parts = [self, *others]
        shape = (sum(part.shape[0] for part in parts), *self.shape[1:])
        self.card.use()
        block, at = self.card.block(size(self.kind, shape)), 0
        for part in parts:
            self.card.copy(block.address + at, part.pointer, part.nbytes)
            at += part.nbytes
        return DeviceArray(self.card, block, self.kind, shape)

    def numpy(self) -> Array:
        """A copy in the host's memory: float32, or integers."""
        self.card.use()
        block = self.card.staging(self.nbytes)
        self.card.copy(block.address, self.pointer, self.nbytes)
        values = read(as_array(block.host(), 0, self.kind, self.shape), self.kind)
        block.close()
        return values


def as_array(memory: Array, offset: int, kind: str, shape: Shape) -> Array:
    """Bytes of the host's memory as an array."""
    return memory[offset : offset + size(kind, shape)].view(stored(kind)).reshape(shape)
