"""A linear probe: logistic regression on embeddings as they are, deepglint/unicom's example.

C 0.601, at most 1000 iterations, random_state 0, top-1. The example computes embeddings in training
mode, with the batch norms of each batch; here they are those of the finished tower.
"""

from __future__ import annotations

from typing import Any

from edgevlm.engines.evaluation import labelled
from edgevlm.engines.evaluation.labelled import TowerScores
from edgevlm.toolkit.errors import MissingExtra
from edgevlm.toolkit.ops.vocabulary import Array

C = 0.601
ITERATIONS = 1000


def accuracy(
    train: Array, train_labels: Array, test: Array, test_labels: Array, c: float = C
) -> float:
    """Share of test images whose class the probe names, from 0 to 1. Raises MissingExtra."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtra("scikit-learn", "probe", purpose="a linear probe") from None
    probe = LogisticRegression(C=c, max_iter=ITERATIONS, random_state=0)
    return float((probe.fit(train, train_labels).predict(test) == test_labels).mean())


def run(request: Any) -> TowerScores:
    """The task `probe`: of the folders train and test, each with a folder for each class."""
    found = labelled.embedded(request, labelled.sets_in(request.data, ("train", "test"), both=True))
    train, test = found.sets["train"], found.sets["test"]
    top = accuracy(train.embeddings, train.labels, test.embeddings, test.labels)
    return labelled.scores({"top1": top}, found, {"C": C, "max_iter": ITERATIONS})
