"""Reading, preparing and collating one batch: what a worker process does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.training.data import tar_samples
from edgevlm.training.data.broken import BrokenSample, Report
from edgevlm.training.data.collate import Batch, collate
from edgevlm.training.data.prepare import SampleRules, prepare
from edgevlm.training.data.sample import Sample
from edgevlm.training.data.samples import RawSample, Samples
from edgevlm.training.data.tar_samples import Entry

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """A batch of the good samples, as collate makes it, and what happened to each sample.

    used: the good ones' names, and whether each was truncated. broken: those that are missing.
    """

    batch: Batch
    used: tuple[tuple[str, bool], ...]
    broken: tuple[BrokenSample, ...]

    def count(self, report: Report) -> None:
        """Count all samples in a report."""
        for name, truncated in self.used:
            report.good(name, truncated=truncated)
        for bad in self.broken:
            report.add(bad)


def load(
    source: Samples, indices: Sequence[int], rules: SampleRules, tokenizer: Tokenizer
) -> Loaded:
    """The batch of these samples of a data set with a length."""

    def read(index: int) -> RawSample:
        return source[index]

    return _gathered((_attempt(read, index, rules, tokenizer) for index in indices), rules)


def load_entries(
    entries: Iterable[Entry | BrokenSample], rules: SampleRules, tokenizer: Tokenizer
) -> Loaded:
    """The batch of these entries of a stream."""
    tried = (
        entry
        if isinstance(entry, BrokenSample)
        else _attempt(tar_samples.read, entry, rules, tokenizer)
        for entry in entries
    )
    return _gathered(tried, rules)


def _attempt(
    read: Callable[[T], RawSample], key: T, rules: SampleRules, tokenizer: Tokenizer
) -> Sample | BrokenSample:
    """The prepared sample, or what is wrong with it, as a value."""
    try:
        return prepare(read(key), rules, tokenizer)
    except BrokenSample as bad:
        return bad


def _gathered(tried: Iterable[Sample | BrokenSample], rules: SampleRules) -> Loaded:
    good: list[Sample] = []
    broken: list[BrokenSample] = []
    for one in tried:
        if isinstance(one, BrokenSample):
            broken.append(one)
        else:
            good.append(one)
    used = tuple((sample.name, sample.lost > 0) for sample in good)
    return Loaded(collate(good, rules), used, tuple(broken))
