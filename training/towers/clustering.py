"""Clusters of image embeddings, and the nearest clusters of each image: the labels of towers.

UNICOM (arXiv 2304.05884) trains on the nearest centre of each image, MLCD (arXiv 2407.17331) on
the l nearest. Both cluster once, before training. Clustering is k-means by cosine (Dhillon and
Modha, 2001), as the losses compare by cosine. The rows stay on the disk and are read in pieces.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgevlm.toolkit.errors import ConfigError, InputError
from edgevlm.toolkit.ops.vocabulary import Array

ROWS = 8192  # rows that are read and compared at a time
CENTRES = 65536  # centres that they are compared with at a time: 2 GB of cosines with ROWS
_CAREFUL = 4096  # so many centres at most are chosen far apart; choosing takes as many passes
_SPLIT = 1e-2  # length of the step by which the two halves of a cluster are moved apart


@dataclass(frozen=True)
class Clusters:
    """centres [k, d] float32 of length 1; sizes [k] int64: rows for which each was the nearest.

    similarity: the mean cosine between rows and their nearest centre, of each pass. Both were
    counted before the last pass moved the centres.
    """

    centres: Array
    sizes: Array
    similarity: tuple[float, ...]


def open_embeddings(path: Path) -> Array:
    """The matrix [N, d] in a .npy file, or the only array of a .npz, mapped into memory.

    A compressed .npz cannot be mapped and is read whole. Raises InputError for other content.
    """
    try:
        rows = _map_npz(path) if path.suffix == ".npz" else np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as broken:
        raise InputError(f"{path} holds no embeddings: {broken}") from None
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise InputError(f"{path} holds {rows.dtype} {list(rows.shape)}, expected floats [N, d]")
    return rows


def _map_npz(path: Path) -> Array:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) != 1:
            raise InputError(f"{path} holds {len(members)} arrays, expected one")
        if members[0].compress_type != zipfile.ZIP_STORED:
            with np.load(path) as arrays:
                whole: Array = arrays[arrays.files[0]]
                return whole
        with archive.open(members[0]) as member:
            version = np.lib.format.read_magic(member)
            read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                version, np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(member)
            start = member.tell()
    with path.open("rb") as file:  # the local header's name and extra field precede the data
        file.seek(members[0].header_offset + 26)
        name, extra = np.frombuffer(file.read(4), "<u2")
    offset = members[0].header_offset + 30 + int(name) + int(extra) + start
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def write_embeddings(batches: Iterable[Array], count: int, out: Path) -> None:
    """Write batches [n, d] of `count` rows in all as one float16 .npy, whole or not at all.

    Raises InputError for another number of rows.
    """
    file: Array | None = None
    partial, position = _partial(out), 0
    for batch in batches:
        if file is None:
            file = np.lib.format.open_memmap(partial, "w+", np.float16, (count, batch.shape[1]))
        if position + len(batch) > count:
            raise InputError(f"{out}: more than the stated {count} embeddings came")
        file[position : position + len(batch)] = batch
        position += len(batch)
    if file is None or position < count:
        raise InputError(f"{out}: {position} embeddings came, {count} were stated")
    file.flush()  # type: ignore[attr-defined]
    os.replace(partial, out)


def cluster(
    rows: Array,
    count: int,
    *,
    seed: int = 0,
    passes: int = 10,
    device: str = "cpu",
    chunk_rows: int = ROWS,
    chunk_centres: int = CENTRES,
) -> Clusters:
    """`count` clusters of embeddings [N, d] (any float, mapped from a file if large).

    Each pass reads all rows, chunk by chunk, and moves every centre to the mean direction of its
    rows; it ends early when no row changes its cluster's size. A cluster that got no row takes
    over half of one of the largest. Memory: two tables [count, d] and the chunks. The result
    follows from the seed, on one machine with the same chunks. Raises ConfigError if there are
    fewer rows than clusters, InputError for a row that is not finite.
    """
    if not 0 < count <= len(rows):
        raise ConfigError(f"{len(rows)} embeddings cannot be put into {count} clusters")
    generator = torch.Generator().manual_seed(seed)
    centres = _first_centres(rows, count, generator, chunk_rows).to(device)
    similarity: list[float] = []
    previous = None
    for _ in range(passes):
        sums, sizes = torch.zeros_like(centres), torch.zeros(count, dtype=torch.long, device=device)
        close = 0.0
        for _, chunk in _chunks(rows, chunk_rows, device):
            found = nearest(chunk, centres, 1, chunk_centres)
            _add_rows(sums, found.indices[:, 0], chunk)
            sizes += torch.bincount(found.indices[:, 0], minlength=count)
            close += float(found.values.sum(dtype=torch.float64))
        similarity.append(close / len(rows))
        centres = _moved(centres, sums, sizes, generator)
        if previous is not None and torch.equal(sizes, previous) and _settled(similarity):
            break
        previous = sizes
    return Clusters(centres.cpu().numpy(), sizes.cpu().numpy(), tuple(similarity))


def write_labels(
    rows: Array,
    centres: Array,
    count: int,
    out: Path,
    *,
    device: str = "cpu",
    chunk_rows: int = ROWS,
    chunk_centres: int = CENTRES,
) -> None:
    """Write the numbers of the `count` nearest centres of each row, the nearest first.

    The file is a .npy of int32 [N, count], row i for image i, written whole or not at all.
    Raises ConfigError if there are fewer centres than that.
    """
    if not 0 < count <= len(centres):
        raise ConfigError(f"{count} labels an image, but there are {len(centres)} clusters")
    table = F.normalize(torch.from_numpy(np.asarray(centres, np.float32))).to(device)
    partial = _partial(out)
    file = np.lib.format.open_memmap(partial, "w+", np.int32, (len(rows), count))
    for start, chunk in _chunks(rows, chunk_rows, device):
        found = nearest(chunk, table, count, chunk_centres)
        file[start : start + len(chunk)] = found.indices.cpu().numpy()
    file.flush()
    os.replace(partial, out)


@dataclass(frozen=True)
class Nearest:
    """values [B, count]: cosines, falling; indices [B, count]: which centres."""

    values: Tensor
    indices: Tensor


def nearest(rows: Tensor, centres: Tensor, count: int, chunk_centres: int = CENTRES) -> Nearest:
    """The `count` nearest centres [K, d] of each row [B, d], both of length 1."""
    found = Nearest(rows.new_zeros(len(rows), 0), torch.zeros(len(rows), 0, dtype=torch.long))
    values, indices = found.values, found.indices.to(rows.device)
    for start in range(0, len(centres), chunk_centres):
        cosines = rows @ centres[start : start + chunk_centres].T
        here = cosines.topk(min(count, cosines.shape[1]), 1)
        values = torch.cat([values, here.values], 1)
        indices = torch.cat([indices, here.indices + start], 1)
        best = values.topk(min(count, values.shape[1]), 1)
        values, indices = best.values, indices.gather(1, best.indices)
    return Nearest(values, indices)


def _chunks(rows: Array, size: int, device: str) -> Iterator[tuple[int, Tensor]]:
    """The rows in order, of length 1, and the number of the first. Raises InputError."""
    for start in range(0, len(rows), size):
        chunk = np.asarray(rows[start : start + size], np.float32)
        finite = np.isfinite(chunk).all(1)
        if not finite.all():
            raise InputError(f"embedding {start + int(finite.argmin())} holds NaN or infinity")
        yield start, F.normalize(torch.from_numpy(chunk).to(device))


def _first_centres(rows: Array, count: int, generator: torch.Generator, chunk_rows: int) -> Tensor:
    """Rows drawn at random: far apart from one another where there are few clusters."""
    careful = count <= _CAREFUL
    sample = min(len(rows), max(16 * count, chunk_rows)) if careful else count
    chosen = torch.randperm(len(rows), generator=generator)[:sample].sort().values.numpy()
    drawn = torch.cat([chunk for _, chunk in _chunks(rows[chosen], chunk_rows, "cpu")])
    return _far_apart(drawn, count, generator) if careful else drawn


def _far_apart(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): each next by its squared distance to the rest."""
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    distances = (2 - 2 * rows @ rows[chosen[0]]).clamp(min=0)
    while len(chosen) < count:
        distances[chosen] = 0
        # Where all rows equal a chosen one, any other row will do.
        weights = distances if float(distances.sum()) > 0 else _unchosen(len(rows), chosen)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distances = torch.minimum(distances, (2 - 2 * rows @ rows[chosen[-1]]).clamp(min=0))
    return rows[chosen]


def _unchosen(count: int, chosen: list[int]) -> Tensor:
    weights = torch.ones(count)
    weights[chosen] = 0
    return weights


def _add_rows(sums: Tensor, clusters: Tensor, rows: Tensor) -> None:
    """sums[clusters[i]] += rows[i], in an order that does not change from run to run."""
    if sums.device.type == "cpu":
        sums.index_add_(0, clusters, rows)
    else:  # which sorts on a GPU, where index_add_ adds in any order
        sums.index_put_((clusters,), rows, accumulate=True)


def _moved(centres: Tensor, sums: Tensor, sizes: Tensor, generator: torch.Generator) -> Tensor:
    """The mean directions; empty clusters take over halves of the largest ones."""
    moved = torch.where(sizes[:, None] > 0, F.normalize(sums), centres)
    empty = (sizes == 0).nonzero()[:, 0]
    largest = sizes.argsort(descending=True, stable=True)[: len(empty)]
    largest = largest[sizes[largest] > 1]
    empty = empty[: len(largest)]
    if len(empty):
        noise = torch.randn(len(empty), centres.shape[1], generator=generator)
        step = _SPLIT * F.normalize(noise).to(centres.device)
        moved[empty] = F.normalize(moved[largest] + step)
        moved[largest] = F.normalize(moved[largest] - step)
    return moved


def _settled(similarity: list[float]) -> bool:
    return similarity[-1] - similarity[-2] < 1e-7


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")
