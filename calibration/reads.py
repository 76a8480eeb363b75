"""What the language model reads of a sample, and what of that goes through it together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from edgevlm.calibration.pictures import Sample
from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops.vocabulary import Array

SCORED = 16  # positions of a prompt whose logits are compared
SCORED_IN_TEXT = 64
_TOKENS = 4096  # of prompts that go through the language model together; one may be longer


@dataclass(frozen=True)
class Read:
    """ids and rows [1, S], features or None as the language model takes them; score [P]."""

    ids: Array
    rows: Array
    features: Array | None
    score: Array

    def answering(self, answer: Array) -> Read:
        """With an answer behind it; scored too: the positions at which its tokens are chosen."""
        if not len(answer):
            return self
        first = self.ids.shape[1] - 1
        ids = np.concatenate([self.ids, answer[None, :-1]], 1)
        rows = np.concatenate([self.rows, np.full((1, len(answer) - 1), -1)], 1)
        score = np.concatenate([self.score, np.arange(first, first + len(answer))])
        return Read(ids, rows, self.features, score)

    def closing_with(self, token: int) -> Read:
        """With one token more, which is scored too."""
        ids = np.append(self.ids, [[token]], 1)
        rows = np.append(self.rows, [[-1]], 1)
        return Read(ids, rows, self.features, np.append(self.score, self.ids.shape[1]))


def read(ids: Array, rows: Array, features: Array | None, scored: int) -> Read:
    """A prompt of which up to `scored` positions of text are scored, spread evenly.

    ids, rows: int64 [1, length]; features: float [rows, hidden_size]. Raises CalibrationError
    without any text.
    """
    texts = np.flatnonzero(rows[0] < 0)  # after an image token, logits mean nothing
    if not len(texts):
        raise CalibrationError("a prompt has no text that the model sees", hint="leave it out")
    return Read(ids, rows, features, texts[spread(len(texts), scored)])


def following(sample: Sample) -> Array | None:
    """The token behind each scored position of a text, -1 behind its last; None for a prompt."""
    if sample.ids is None:
        return None
    at = spread(len(sample.ids), SCORED_IN_TEXT)
    return np.asarray(np.append(sample.ids, -1)[at + 1])


def spread(count: int, most: int) -> Array:
    """At most so many of the first `count` numbers."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))


def groups(reads: Sequence[Read]) -> Iterator[list[int]]:
    """Numbers of those that go together: neighbours of one length that score as many tokens."""
    alike = groupby(range(len(reads)), lambda i: (reads[i].ids.shape[1], len(reads[i].score)))
    for (length, _), run in alike:
        numbers, most = list(run), max(_TOKENS // length, 1)
        for start in range(0, len(numbers), most):
            yield numbers[start : start + most]
