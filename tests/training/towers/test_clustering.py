"""Clusters of embeddings, and the labels made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.toolkit.errors import ConfigError, InputError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.training.towers.clustering import (
    cluster,
    open_embeddings,
    write_embeddings,
    write_labels,
)


def groups(count: int = 20, each: int = 30, width: int = 16) -> tuple[Array, Array]:
    """Rows around `count` directions, of any length; and the direction of each row."""
    generator = np.random.default_rng(3)
    centres = generator.normal(size=(count, width))
    labels = generator.permutation(np.repeat(np.arange(count), each))
    rows = centres[labels] + 0.1 * generator.normal(size=(count * each, width))
    rows *= generator.uniform(0.5, 20, (len(rows), 1))
    return rows.astype(np.float32), labels


def purity(found: Array, truth: Array) -> float:
    """Share of rows whose cluster is mostly of their group."""
    right = sum(np.bincount(truth[found == c]).max() for c in np.unique(found))
    return float(right) / len(truth)


def test_separate_groups_are_found(tmp_path: Path) -> None:
    rows, truth = groups()
    found = cluster(rows, 20, seed=1, passes=20)
    np.testing.assert_allclose(np.linalg.norm(found.centres, axis=1), 1, atol=1e-6)
    assert found.sizes.sum() == len(rows)
    assert list(found.similarity) == sorted(found.similarity)
    assert len(found.similarity) < 20  # it ended early
    write_labels(rows, found.centres, 3, tmp_path / "labels.npy")
    labels = np.load(tmp_path / "labels.npy")
    assert labels.dtype == np.int32
    assert purity(labels[:, 0], truth) > 0.95


@pytest.mark.parametrize("chunk", [7, 64, 10_000])
def test_labels_are_the_nearest_centres_whatever_the_chunks(tmp_path: Path, chunk: int) -> None:
    rows, _ = groups()
    centres = np.random.default_rng(4).normal(size=(50, 16)).astype(np.float32)
    write_labels(rows, centres, 8, tmp_path / "l.npy", chunk_rows=chunk, chunk_centres=chunk)
    cosines = (rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ (
        centres / np.linalg.norm(centres, axis=1, keepdims=True)
    ).T
    expected = np.argsort(-cosines, 1)[:, :8]
    assert np.array_equal(np.load(tmp_path / "l.npy"), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["l.npy"]


def test_the_seed_decides(tmp_path: Path) -> None:
    rows, _ = groups()
    first, again, other = (cluster(rows, 30, seed=s, passes=4) for s in (1, 1, 2))
    assert np.array_equal(first.centres, again.centres)
    assert not np.array_equal(first.centres, other.centres)


def test_chunks_change_rounding_only() -> None:
    rows, _ = groups()
    whole = cluster(rows, 20, seed=1, chunk_rows=1000)
    pieces = cluster(rows, 20, seed=1, chunk_rows=1000, chunk_centres=3)
    np.testing.assert_allclose(pieces.centres, whole.centres, atol=1e-5)


@pytest.mark.parametrize("careful", [True, False])
def test_clusters_without_rows_are_filled(careful: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevlm.training.towers import clustering

    rows, _ = groups(count=3, each=200)
    if not careful:
        monkeypatch.setattr(clustering, "_CAREFUL", 0)
        start = np.repeat(rows[:1], 40, 0)  # all centres begin at one place
        rows = np.concatenate([start, rows])
        real = clustering._first_centres
        monkeypatch.setattr(clustering, "_first_centres", lambda r, k, g, c: real(r[:40], k, g, c))
    found = cluster(rows, 40, seed=1, passes=30)
    assert (found.sizes > 0).sum() >= 38
    assert found.sizes.sum() == len(rows)


def test_equal_rows_leave_clusters_empty_and_finite() -> None:
    found = cluster(np.ones((10, 4), np.float32), 5, passes=3)
    assert np.isfinite(found.centres).all()
    assert found.sizes.sum() == 10


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
def test_embeddings_come_from_files(tmp_path: Path, save: Any) -> None:
    rows, _ = groups()
    path = tmp_path / ("rows.npy" if save is np.save else "rows.npz")
    save(path, rows.astype(np.float16))
    found = open_embeddings(path)
    assert np.array_equal(found, rows.astype(np.float16))
    assert isinstance(found, np.memmap) == (save is not np.savez_compressed)
    centres = cluster(found, 20, seed=1, chunk_rows=50).centres
    assert np.array_equal(centres, cluster(np.array(found), 20, seed=1, chunk_rows=50).centres)


def test_embeddings_are_written_whole_or_not(tmp_path: Path) -> None:
    rows, _ = groups()
    out = tmp_path / "rows.npy"
    for batches in ([rows[:10]], [rows[:10], rows[:11]], []):
        with pytest.raises(InputError, match=r"rows\.npy"):
            write_embeddings(batches, 20, out)
        assert not out.exists()
    write_embeddings([rows[:13], rows[13:20]], 20, out)
    assert np.array_equal(open_embeddings(out), rows[:20].astype(np.float16))


def test_what_is_no_matrix_of_embeddings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    path.write_bytes(b"no array")
    with pytest.raises(InputError, match="holds no embeddings"):
        open_embeddings(path)
    np.save(path, np.zeros(3))
    with pytest.raises(InputError, match=r"float64 \[3\], expected"):
        open_embeddings(path)
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 2)), b=np.zeros((2, 2)))
    with pytest.raises(InputError, match="2 arrays"):
        open_embeddings(tmp_path / "two.npz")
    rows = np.ones((5, 4), np.float32)
    rows[3, 1] = np.nan
    with pytest.raises(InputError, match="embedding 3 holds NaN"):
        cluster(rows, 2, chunk_rows=2)
    with pytest.raises(ConfigError, match="5 embeddings cannot be put into 6"):
        cluster(rows, 6)
    with pytest.raises(ConfigError, match="3 labels an image"):
        write_labels(rows, rows[:2], 3, tmp_path / "l.npy")
