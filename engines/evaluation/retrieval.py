"""Retrieval by embeddings: Recall@1 and mAP@100, as deepglint/unicom scores them.

Recall@1 (retrieval.py): embeddings divided by their length, then the first channels if only some
are wanted (not divided again), and the nearest by Euclid. In one set the second nearest counts, as
the first is taken to be the picture itself; with a gallery the nearest. mAP@100
(finetune_GLDv2.py): the largest inner products of embeddings as they are.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import numpy as np

from edgevlm.engines.evaluation import labelled
from edgevlm.engines.evaluation.labelled import TowerScores
from edgevlm.engines.runtime.embedding import normalised
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.ops.vocabulary import Array

_ROWS = 128  # queries that are compared at a time
_DEPTH = 100  # of mAP@100


def nearest(queries: Array, gallery: Array, count: int, channels: int | None = None) -> Array:
    """The `count` nearest of `gallery` [M, d] for each query [N, d], the nearest first: int64.

    channels: how many of the first ones count. Raises InputError if there are fewer than `count`.
    """
    if len(gallery) < count:
        raise InputError(f"{len(gallery)} embeddings have no {count} nearest")
    others = normalised(gallery)[:, :channels]
    own = normalised(queries)[:, :channels]
    lengths = (others**2).sum(1)
    found = []
    for start in range(0, len(own), _ROWS):
        x = own[start : start + _ROWS]
        squares = (x**2).sum(1)[:, None] + lengths - 2 * (x @ others.T)
        distances = np.maximum(squares, np.float32(1e-12))
        near = np.argpartition(distances, count - 1, 1)[:, :count]
        order = np.argsort(np.take_along_axis(distances, near, 1), 1, kind="stable")
        found.append(np.take_along_axis(near, order, 1))
    return np.concatenate(found)


def recall_in_one_set(embeddings: Array, labels: Array, channels: int | None = None) -> float:
    """Recall@1 in %: of each picture [N, d] the nearest other one is of its class.

    Exact duplicates may put another picture first; the second is taken all the same.
    """
    second = nearest(embeddings, embeddings, 2, channels)[:, 1]
    return float(100 * (labels[second] == labels).mean())


def recall_in_gallery(
    queries: Array,
    query_labels: Array,
    gallery: Array,
    gallery_labels: Array,
    channels: int | None = None,
) -> float:
    """Recall@1 in %: the nearest of the gallery is of the query's class."""
    first = nearest(queries, gallery, 1, channels)[:, 0]
    return float(100 * (gallery_labels[first] == query_labels).mean())


def ranked(queries: Array, gallery: Array, depth: int = _DEPTH) -> Array:
    """The gallery's numbers by inner product, the largest first: int64 [N, at most depth]."""
    depth = min(depth, len(gallery))
    found = []
    for start in range(0, len(queries), _ROWS):
        scores = queries[start : start + _ROWS] @ gallery.T
        top = np.argpartition(-scores, depth - 1, 1)[:, :depth]
        order = np.argsort(-np.take_along_axis(scores, top, 1), 1, kind="stable")
        found.append(np.take_along_axis(top, order, 1))
    return np.concatenate(found)


def average_precision(ids: Sequence[Any], right: Set[Any], depth: int = _DEPTH) -> float:
    """AP of one query: the sum of (hits so far / rank) at hits, over min(right ones, depth).

    ids: answers by rank. An id that comes again is no hit, and takes a rank all the same.
    """
    seen: set[Any] = set()
    total = 0.0
    for rank, one in enumerate(ids[:depth], 1):
        if one in right and one not in seen:
            seen.add(one)
            total += len(seen) / rank
    return total / min(len(right), depth) if right else 0.0


def mean_average_precision(
    queries: Array, gallery: Array, gallery_ids: Sequence[Any], solutions: Sequence[Set[Any]]
) -> float:
    """mAP@100, from 0 to 1: the mean AP of all queries. solutions: the right ids of each."""
    answers = ranked(queries, gallery)
    return float(
        np.mean([
            average_precision([gallery_ids[i] for i in row], right)
            for row, right in zip(answers, solutions, strict=True)
        ])
    )  # fmt: skip


def run(request: Any) -> TowerScores:
    """The task `recall`: Recall@1 of a folder with a folder for each class, or of its folders
    query and gallery, with mAP@100 beside it.
    """
    sets = labelled.sets_in(request.data, ("query", "gallery"))
    found = labelled.embedded(request, sets)
    channels = labelled.channels_of(request, found)
    if "query" not in found.sets:
        one = found.sets[""]
        values: dict[str, Any] = {
            "recall_at_1": recall_in_one_set(one.embeddings, one.labels, channels)
        }
    else:
        queries, gallery = found.sets["query"], found.sets["gallery"]
        first = recall_in_gallery(
            queries.embeddings, queries.labels, gallery.embeddings, gallery.labels, channels
        )
        right = [set(np.flatnonzero(gallery.labels == label)) for label in queries.labels]
        ids = range(len(gallery.labels))
        mean = mean_average_precision(queries.embeddings, gallery.embeddings, ids, right)
        values = {"recall_at_1": first, "map_at_100": mean}
    return labelled.scores(values, found, {"channels": channels})
