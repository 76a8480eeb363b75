"""Weighted k-NN classification of embeddings, by DINO's code as deepglint/unicom runs it (knn.py).

Embeddings are divided by their length. Of the max(k) most similar training images each votes for
its class by softmax(similarity / T) over all of them; for a smaller k the first k votes count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgevlm.engines.evaluation import labelled
from edgevlm.engines.evaluation.labelled import TowerScores
from edgevlm.engines.evaluation.retrieval import ranked
from edgevlm.engines.runtime.embedding import normalised
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.ops.vocabulary import Array

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07


def votes(
    train: Array,
    train_labels: Array,
    test: Array,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> dict[int, Array]:
    """Scores of the classes for each test image, float32 [N, classes], by k.

    train [M, d], test [N, d]; labels from 0. Raises InputError if there are fewer than max(ks).
    """
    largest, classes = max(ks), int(train_labels.max()) + 1
    if largest > len(train):
        raise InputError(f"{len(train)} training images have no {largest} nearest")
    known, asked = normalised(train), normalised(test)
    near = ranked(asked, known, largest)
    similar = np.einsum("nd,nkd->nk", asked, known[near]) / np.float32(temperature)
    weights = np.exp(similar - similar.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    voted = train_labels[near]
    found = {}
    for k in ks:
        scores = np.zeros((len(test), classes), np.float32)
        for rank in range(k):
            scores[np.arange(len(test)), voted[:, rank]] += weights[:, rank]
        found[k] = scores
    return found


def accuracies(scores: dict[int, Array], labels: Array) -> dict[int, float]:
    """Share of test images whose class has the most votes, from 0 to 1, by k."""
    return {k: float((found.argmax(1) == labels).mean()) for k, found in scores.items()}


def run(request: Any) -> TowerScores:
    """The task `knn`: of the folders train and test, each with a folder for each class."""
    found = labelled.embedded(request, labelled.sets_in(request.data, ("train", "test"), both=True))
    train, test = found.sets["train"], found.sets["test"]
    ks = tuple(k for k in KS if k <= len(train.labels)) or (len(train.labels),)
    scores = votes(train.embeddings, train.labels, test.embeddings, ks)
    top = accuracies(scores, test.labels)
    values = {f"top1_k{k}": accuracy for k, accuracy in top.items()}
    return labelled.scores(values, found, {"k": list(ks), "temperature": TEMPERATURE})
