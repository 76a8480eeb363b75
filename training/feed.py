"""What training is fed: data sets as the micro-batches of each optimizer step.

Which samples a step holds follows from the seed and the step's number alone, so that a run goes on
at the very sample at which it was cut off, with any number of processes and workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from edgevlm.toolkit.errors import DataError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.training.data import broken, sampling, sources, tar_samples
from edgevlm.training.data.broken import BrokenSample
from edgevlm.training.data.collate import collate
from edgevlm.training.data.prepare import SampleRules, prepare
from edgevlm.training.data.samples import RawSample, Samples
from edgevlm.training.data.sampling import Batching, Shuffle
from edgevlm.training.data.scan import Scan, scan
from edgevlm.training.data.tar_samples import Entry, TarSamples
from edgevlm.training.vlm import Batch

Item: TypeAlias = "int | Entry | BrokenSample"  # an index, or a sample in a shard
Fault = BrokenSample  # truncated samples are told in the same way, though they are used


@dataclass(frozen=True)
class Chosen:
    """What a batch is made of. epoch: on which random draws may depend; None in evaluation."""

    items: Sequence[Item]
    epoch: int | None = None


@dataclass(frozen=True)
class Joined:
    """Several data sets as one."""

    parts: tuple[Samples, ...]

    def __len__(self) -> int:
        """Samples of all parts."""
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> RawSample:
        """The sample at `index` of all. Raises BrokenSample."""
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


@dataclass(frozen=True)
class Prepared(Dataset[Any]):
    """Lists of items as batches, with what was wrong; made in worker processes where wanted."""

    source: Samples | None
    rules: SampleRules
    tokenizer: Tokenizer

    def __getitem__(self, chosen: Chosen) -> tuple[Batch, list[Fault]]:
        """The batch of the items that can be used, and the faults of the others."""
        samples, faults = [], []
        for item in chosen.items:
            try:
                sample = prepare(self._raw(item), self.rules, self.tokenizer)
            except BrokenSample as fault:
                faults.append(fault)
                continue
            samples.append(sample)
            if sample.lost:
                reason = f"{sample.lost} positions too many"
                faults.append(BrokenSample(sample.name, broken.TRUNCATED, reason))
        batch = collate(samples, self.rules)
        batch["lengths"] = torch.tensor([sample.length for sample in samples] or [0])
        batch["filler"] = not samples
        return batch, faults

    def _raw(self, item: Item) -> RawSample:
        if isinstance(item, BrokenSample):
            raise item
        if isinstance(item, Entry):
            return tar_samples.read(item)
        assert self.source is not None
        return self.source[item]


@dataclass(frozen=True)
class DataSet:
    """A data set as it is used: indexed, with the result of its scan, or a stream of shards.

    size: its samples, the broken ones among them.
    """

    indexed: Samples | None
    stream: TarSamples | None
    scanned: Scan | None
    size: int

    @property
    def faults(self) -> tuple[Fault, ...]:
        """What the scan found."""
        return self.scanned.broken if self.scanned is not None else ()


def open_data(
    paths: Sequence[str], images: str | None, advance: Callable[[int, int], None] | None = None
) -> DataSet:
    """Open and scan data sets; advance: told samples done and their number. Raises DataError."""
    folder = None if images is None else Path(images)
    opened = [sources.open_samples(Path(path), folder) for path in paths]
    streams = [part for part in opened if isinstance(part, TarSamples)]
    if streams:
        if len(streams) < len(opened):
            raise DataError(
                "shards and other data sets cannot be mixed in one run",
                hint="write all of them as .tar shards",
            )
        shards = [path for part in streams for path in part.paths]
        stream = TarSamples(shards)
        return DataSet(None, stream, None, _some(stream.count(), paths))
    joined = Joined(tuple(part for part in opened if not isinstance(part, TarSamples)))
    size = _some(len(joined), paths)
    told = (lambda done: advance(done, size)) if advance else (lambda done: None)
    return DataSet(joined, None, scan(joined, advance=told), size)


def _some(size: int, paths: Sequence[str]) -> int:
    if not size:
        raise DataError(f"{', '.join(paths)} holds no samples")
    return size


@dataclass(frozen=True)
class Feed:
    """The batches of one process. made: Chosen -> a batch and the faults of its samples.

    on_fault: told about every sample that is skipped or cut.
    """

    data: DataSet
    made: Dataset[Any]
    batching: Batching
    rank: int
    on_fault: Callable[[Fault], None]
    seed: int = 0
    grouped: bool = False
    workers: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every usable sample was seen."""
        if self.data.scanned is None:
            return max(self.data.size // self.batching.step, 1)
        return -(-len(self.data.scanned.usable) // self.batching.step)

    def steps(self, start: int) -> Iterator[list[Batch]]:
        """The micro-batches of every optimizer step from number `start` on, without an end."""
        micro: list[Batch] = []
        for batch, faults in self._loaded(self._items(start)):
            for fault in faults:
                self.on_fault(fault)
            micro.append(batch)
            if len(micro) == self.batching.accumulation:
                yield micro
                micro = []

    def once(self) -> Iterator[Batch]:
        """This process's batches of one pass in order, for evaluation."""
        whole = replace(self.batching, accumulation=1, last="short")
        items = self._epoch(whole, None, 0)
        for batch, faults in self._loaded(items):
            for fault in faults:
                self.on_fault(fault)
            yield batch

    def _items(self, start: int) -> Iterator[Chosen]:
        first, within = divmod(start, self.steps_per_epoch)
        for epoch in count(first):
            shuffle = Shuffle(self.seed, epoch)
            begun = within if epoch == first else 0
            yield from self._epoch(self.batching, shuffle, begun * self.batching.accumulation)

    def _epoch(self, batching: Batching, shuffle: Shuffle | None, start: int) -> Iterator[Chosen]:
        """The items of each batch from global batch `start` on."""
        epoch = None if shuffle is None else shuffle.epoch
        if self.data.stream is not None:
            stream = self.data.stream.stream(shuffle, start * batching.together)
            for dealt in sampling.dealt(_whole_steps(stream, self, start), batching, self.rank):
                yield Chosen(list(dealt), epoch)
            return
        scanned = self.data.scanned
        assert scanned is not None
        lengths: Array | None = scanned.lengths if self.grouped else None
        chosen = sampling.order(len(scanned.usable), batching, shuffle, lengths)
        usable: Any = scanned.usable[np.asarray(chosen, np.int64)]
        for batch in sampling.batches(usable, batching, self.rank, start):
            yield Chosen(list(batch), epoch)

    def _loaded(self, items: Iterable[Chosen]) -> Iterator[tuple[Batch, list[Fault]]]:
        if not self.workers:
            return (self.made[chosen] for chosen in items)
        return iter(DataLoader(self.made, sampler=items, batch_size=None, num_workers=self.workers))


def _whole_steps(
    stream: Iterator[Entry | BrokenSample], feed: Feed, start: int
) -> Iterator[Entry | BrokenSample]:
    """A stream cut so that it ends with a whole step; what is left of an epoch is not used."""
    if feed.batching.last == "short":
        yield from stream
        return
    left = (feed.steps_per_epoch * feed.batching.accumulation - start) * feed.batching.together
    for number, entry in enumerate(stream):
        if number >= left:
            return
        yield entry
