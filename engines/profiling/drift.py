"""How far the engines of a comparison are from its first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgevlm.engines.profiling import asked
from edgevlm.engines.profiling.asked import ProfileRequest
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.ops.vocabulary import Array

_FOLLOWED = 32  # positions that are compared


@dataclass(frozen=True)
class Drift:
    """How far an engine is from the first of a comparison, along that one's greedy tokens.

    kl: mean divergence of the next token's distribution, in nats; top1: how often the likeliest
    token is the same; of so many positions.
    """

    kl: float
    top1: float
    positions: int


class Followed:
    """The first engine's greedy tokens of one question, and what it says next after each."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._said: list[Array] = []

    def drift(self, session: Session, request: ProfileRequest) -> Drift | None:
        """Of this engine; of the first, whose tokens are kept, it is nothing. None where engines
        have other vocabularies, or prompts of another length.
        """
        said = self._following(session, request)
        if not self._said:
            self._said = said
        if self._said[0].shape != said[0].shape:
            return None
        pairs = list(zip(self._said, said, strict=True))
        kl = [float((np.exp(p) * (p - q)).sum(dtype=np.float64)) for p, q in pairs]
        same = [p.argmax() == q.argmax() for p, q in pairs]
        return Drift(float(f"{max(np.mean(kl), 0):.6g}"), float(np.mean(same)), len(pairs))

    def _following(self, session: Session, request: ProfileRequest) -> list[Array]:
        """Log probabilities after the prompt and after each token of the first engine."""
        state, first = session.new_state(), not self._tokens
        features = session.encode([asked.image(request, 0)], Clock())
        sequence = asked.sequence(session, request, features.indices)
        said = [_log_probabilities(session.prefill(sequence, features.rows, state))]
        for step in range(min(request.max_tokens, _FOLLOWED) - 1):
            if first:
                self._tokens.append(int(said[-1].argmax()))
            token = self._tokens[step]
            if token >= session.model.lm.config.vocab_size:
                break
            said.append(_log_probabilities(session.decode(token, sequence.length + step, state)))
        return said


def _log_probabilities(logits: Array) -> Array:
    shifted = np.asarray(logits, np.float32) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
