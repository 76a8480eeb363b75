"""The order of the samples: which one is in which batch of which process.

Everything follows from numbers (size, seed, epoch, lengths), so any batch can be named without
reading data, and R processes with batches of b see the same global batches as one with R * b.
Draws are raw numbers of a bit generator, whose stream NumPy never changes, unlike its shuffles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array

T = TypeVar("T")


@dataclass(frozen=True)
class Shuffle:
    """What a random order depends on."""

    seed: int
    epoch: int

    def bits(self, purpose: int) -> np.random.PCG64:
        """Random numbers for one purpose: 0 orders samples or shards, 1 draws from a window."""
        return np.random.PCG64(np.random.SeedSequence((self.seed, self.epoch, purpose)))


@dataclass(frozen=True)
class Batching:
    """How samples are dealt to processes.

    batch: samples of one process at a time; world: processes; accumulation: batches of a step.
    last: what happens if the samples do not fill the last step. "fill" takes the first ones again,
    as accelerate does, "drop" leaves it out, "short" makes it smaller (evaluation).
    """

    batch: int
    world: int = 1
    accumulation: int = 1
    last: Literal["fill", "drop", "short"] = "fill"

    @property
    def together(self) -> int:
        """Samples of all processes at a time: one global batch."""
        return self.batch * self.world

    @property
    def step(self) -> int:
        """Samples of one step of the optimizer."""
        return self.together * self.accumulation


def permutation(size: int, shuffle: Shuffle) -> Array:
    """A random order of 0 .. size - 1, int64."""
    return _permuted(size, shuffle.bits(0))


def _permuted(size: int, bits: np.random.PCG64) -> Array:
    return np.argsort(bits.random_raw(size), kind="stable").astype(np.int64)


def order(
    size: int, batching: Batching, shuffle: Shuffle | None, lengths: Array | None = None
) -> Array:
    """The samples of one epoch in the order in which they are used, int64; None: as they are.

    lengths: int64 [size], negative for samples without images. With them, samples of like length
    and of one kind come together, as LLaVA's trainer does (group_by_modality_length): each mega-
    batch, the samples of one step, is sorted and dealt so that its batches have about equal sums.
    Only the last one mixes both kinds. The order of the mega-batches is random.
    """
    if shuffle is None:
        chosen = np.arange(size)
    elif lengths is None:
        chosen = permutation(size, shuffle)
    else:
        chosen = np.array(_grouped(lengths, batching, shuffle.bits(0)), np.int64)
    return _ended(chosen, batching)


def _ended(chosen: Array, batching: Batching) -> Array:
    rest = len(chosen) % batching.step
    if not rest or batching.last == "short":
        return chosen
    if batching.last == "drop":
        return chosen[: len(chosen) - rest]
    return np.concatenate([chosen, np.resize(chosen, batching.step - rest)])


def batches(chosen: Array, batching: Batching, rank: int, start: int = 0) -> Iterator[list[int]]:
    """The samples of one process, a batch at a time, from global batch number `start` on.

    With last = "short", the last batch may be smaller, or empty on some processes.
    """
    for first in range(start * batching.together, len(chosen), batching.together):
        mine = first + rank * batching.batch
        end = min(mine + batching.batch, first + batching.together)
        yield chosen[mine:end].tolist()


def dealt(items: Iterable[T], batching: Batching, rank: int) -> Iterator[list[T]]:
    """The same for a stream, which every process goes through whole: batches of one process.

    The rest that fills no global batch is given only if last = "short".
    """
    together: list[T] = []
    mine = slice(rank * batching.batch, (rank + 1) * batching.batch)
    for item in items:
        together.append(item)
        if len(together) == batching.together:
            yield together[mine]
            together = []
    if together and batching.last == "short":
        yield together[mine]


# -- grouping by length ----------------------------------------------------------------------


def _grouped(lengths: Array, batching: Batching, bits: np.random.PCG64) -> list[int]:
    with_images, text = np.flatnonzero(lengths >= 0), np.flatnonzero(lengths < 0)
    sizes = np.maximum(np.abs(lengths), 1)
    if not len(with_images) or not len(text):
        return [i for mega in _megas(np.arange(len(lengths)), sizes, batching, bits) for i in mega]
    kinds = [_megas(kind, sizes, batching, bits) for kind in (with_images, text)]
    whole = [mega for kind in kinds for mega in kind[:-1]]
    ordered = [whole[number] for number in _permuted(len(whole), bits).tolist()]
    # The original sorts what is left by its place in the data set.
    ordered.append(sorted(kinds[0][-1] + kinds[1][-1]))
    return [index for mega in ordered for index in mega]


def _megas(
    indices: Array, sizes: Array, batching: Batching, bits: np.random.PCG64
) -> list[list[int]]:
    """Random mega-batches, each in the order in which its samples are dealt out."""
    shuffled = indices[_permuted(len(indices), bits)].tolist()
    step = batching.step
    return [
        _dealt_out(shuffled[first : first + step], sizes, batching)
        for first in range(0, len(shuffled), step)
    ]


def _dealt_out(mega: Sequence[int], sizes: Array, batching: Batching) -> list[int]:
    """Sorted, dealt to the batches of the step, and each batch to the processes.

    The original deals to batches of all processes at once; in two steps a global batch does not
    depend on the number of processes. An unfinished mega-batch is only sorted, for that reason.
    """
    ordered = sorted(mega, key=lambda index: -int(sizes[index]))
    if len(ordered) < batching.step:
        return ordered
    return [
        index
        for together in _even(ordered, sizes, batching.accumulation)
        for own in _even(together, sizes, batching.world)
        for index in own
    ]


def _even(indices: Sequence[int], sizes: Array, parts: int) -> list[list[int]]:
    """Parts of equal count and about equal sums: each sample goes to the shortest part so far."""
    each = len(indices) // parts
    dealt: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for index in indices:
        shortest = sums.index(min(sums))
        dealt[shortest].append(index)
        sums[shortest] += float(sizes[index])
        if len(dealt[shortest]) == each:
            sums[shortest] = float("inf")
    return dealt
