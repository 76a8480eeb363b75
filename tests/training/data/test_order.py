"""The order of samples: the same for any number of processes, and from any batch on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.training.data import sampling
from edgevlm.training.data.broken import BrokenSample
from edgevlm.training.data.sampling import Batching, Shuffle
from edgevlm.training.data.tar_samples import TarSamples
from tests.training.data.files import write_shards

LENGTHS = np.random.default_rng(1).integers(1, 500, 103) * np.repeat([1, -1], [70, 33])
PARTS = [(1, 8), (2, 4), (4, 2), (8, 1)]  # processes and batch; the global batch is 8


def global_batches(chosen: Array, world: int, batch: int, **options: Any) -> list[list[int]]:
    """What all processes read at the same time, sorted within a batch."""
    batching = Batching(batch, world, **options)
    ranks = [list(sampling.batches(chosen, batching, rank)) for rank in range(world)]
    assert len({len(own) for own in ranks}) == 1  # all processes take part in every step
    return [sorted(sum(parts, [])) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("last", ["fill", "drop", "short"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_many_processes_read_the_global_batches_of_one(
    grouped: bool, last: Literal["fill", "drop", "short"], accumulation: int
) -> None:
    lengths = LENGTHS if grouped else None
    found = []
    for world, batch in PARTS:
        batching = Batching(batch, world, accumulation, last)
        chosen = sampling.order(103, batching, Shuffle(3, 1), lengths)
        options: Any = {"accumulation": accumulation, "last": last}
        found.append(global_batches(chosen, world, batch, **options))
    assert all(other == found[0] for other in found)
    read = [index for batch in found[0] for index in batch]
    steps = 103 // (8 * accumulation)
    rest = {"fill": (steps + 1) * 8 * accumulation, "drop": steps * 8 * accumulation, "short": 103}
    assert len(read) == rest[last]
    assert len(set(read)) == min(103, len(read))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    batching = Batching(4)
    first = sampling.order(50, batching, Shuffle(0, 0))
    assert first.tolist() == sampling.order(50, batching, Shuffle(0, 0)).tolist()
    others = [sampling.order(50, batching, Shuffle(*pair)).tolist() for pair in ((0, 1), (1, 0))]
    assert first.tolist() != others[0] != others[1]
    assert first.dtype == np.int64
    # A changed order would change every resumed run: these are the first draws of today.
    assert first[:8].tolist() == FIRST
    assert sampling.order(50, batching, None)[:5].tolist() == [0, 1, 2, 3, 4]


FIRST = [11, 3, 20, 13, 2, 48, 21, 32]


@pytest.mark.parametrize("start", [0, 1, 5, 12])
def test_a_resumed_run_reads_the_batches_that_follow(start: int) -> None:
    batching = Batching(2, 4)
    chosen = sampling.order(103, batching, Shuffle(0, 2), LENGTHS)
    for rank in range(4):
        whole = list(sampling.batches(chosen, batching, rank))
        assert list(sampling.batches(chosen, batching, rank, start)) == whole[start:]


def test_samples_of_one_kind_and_of_like_length_come_together() -> None:
    batching = Batching(2, 2, 3, "short")  # mega-batches of 12
    chosen = sampling.order(103, batching, Shuffle(0, 0), LENGTHS).tolist()
    megas = [chosen[i : i + 12] for i in range(0, 103, 12)]
    # 70 samples with images are 5 whole mega-batches and 10; 33 without are 2 and 9.
    kinds = [{bool(LENGTHS[index] > 0) for index in mega} for mega in megas]
    assert [len(kind) for kind in kinds[:7]] == [1] * 7
    assert kinds[:7].count({True}) == 5
    assert sorted(chosen) == list(range(103))
    assert chosen[84:] == sorted(chosen[84:])
    # Each mega-batch is dealt so that its batches are of about equal sums.
    size = np.abs(LENGTHS)
    sums = np.array([[size[mega[i : i + 4]].sum() for i in (0, 4, 8)] for mega in megas[:7]])
    whole = sums.sum(1) / 3
    assert (np.abs(sums - whole[:, None]) / whole[:, None]).mean() < 0.1
    order = [min(mega) for mega in megas[:7]]
    again = sampling.order(103, batching, Shuffle(0, 1), LENGTHS).tolist()
    assert order != [min(again[i : i + 12]) for i in range(0, 84, 12)]


def test_one_mega_batch_is_the_originals_by_hand() -> None:
    # Sorted 9 8 7 6 5 4, dealt to the shorter of two batches: (9, 6, 5) and (8, 7, 4).
    lengths = np.array([4, 9, 5, 8, 6, 7])
    chosen = sampling.order(6, Batching(3, 1, 2), Shuffle(0, 0), lengths)
    assert lengths[chosen].tolist() == [9, 6, 5, 8, 7, 4]
    for one in (lengths, -lengths):
        assert sorted(sampling.order(6, Batching(2, 1, 1), Shuffle(0, 0), one)) == list(range(6))


def test_small_and_empty_sets() -> None:
    for size, last, expected in ((3, "fill", 8), (3, "drop", 0), (3, "short", 3), (0, "fill", 0)):
        batching = Batching(2, 4, last=last)  # type: ignore[arg-type]
        assert len(sampling.order(size, batching, Shuffle(0, 0))) == expected
        assert len(sampling.order(size, batching, Shuffle(0, 0), np.ones(size, np.int64))) == (
            expected
        )
    batching = Batching(2, 4, last="short")
    chosen = sampling.order(3, batching, None)
    dealt = [next(sampling.batches(chosen, batching, rank)) for rank in range(4)]
    assert dealt == [[0, 1], [2], [], []]


# -- streams ---------------------------------------------------------------------------------------


def keys(samples: TarSamples, shuffle: Shuffle | None, start: int = 0) -> list[str]:
    found = []
    for entry in samples.stream(shuffle, start):
        assert not isinstance(entry, BrokenSample)
        found.append(entry.key)
    return found


def test_a_stream_is_shuffled_within_a_window_and_resumes_at_any_sample(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "set", 5, 8)
    samples = TarSamples(paths, window=10)
    straight = keys(samples, None)
    assert straight == [f"{n:04}" for n in range(40)]
    shuffled = keys(samples, Shuffle(0, 0))
    assert sorted(shuffled) == straight != shuffled
    assert shuffled != keys(samples, Shuffle(0, 1)) != keys(samples, Shuffle(1, 0))
    for start in (0, 1, 13, 39, 40):
        assert keys(samples, Shuffle(0, 0), start) == shuffled[start:]
        assert keys(samples, None, start) == straight[start:]
    assert samples.count() == 40


def test_processes_share_a_stream_as_one_would_read_it(tmp_path: Path) -> None:
    samples = TarSamples(write_shards(tmp_path / "set", 3, 7), window=5)
    for last, count in (("drop", 2), ("short", 3)):
        found: list[list[list[str]]] = []
        for world, batch in PARTS:
            batching = Batching(batch, world, last=last)  # type: ignore[arg-type]
            ranks = [
                list(sampling.dealt(keys(samples, Shuffle(0, 0)), batching, rank))
                for rank in range(world)
            ]
            assert {len(own) for own in ranks} == {count}
            found.append([sum(parts, list[str]()) for parts in zip(*ranks, strict=True)])
        assert all(other == found[0] for other in found)
