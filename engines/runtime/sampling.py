"""From logits to a token: greedy, or drawn after temperature, top-k and top-p, from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.ops.vocabulary import Array

Sampler = Callable[[Array], int]


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep everything; seed None differs each time."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def check(self) -> None:
        """Raise ConfigError for values without a meaning."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature {self.temperature} is not a number from 0 on")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p} is not in (0, 1]")
        if self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k} is negative")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"--seed {self.seed} is negative")
        if self.temperature == 0 and (self.top_k, self.top_p) != (0, 1.0):
            raise ConfigError(
                "--top-k and --top-p have no effect at --temperature 0",
                hint="add --temperature 1, or drop them",
            )


def sampler(sampling: Sampling) -> Sampler:
    """A function from logits [vocab] to a token id."""
    sampling.check()
    if sampling.temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = np.random.default_rng(sampling.seed)
    return lambda logits: _draw(logits, sampling, generator)


def _draw(logits: Array, sampling: Sampling, generator: np.random.Generator) -> int:
    best = logits.astype(np.float64) - float(logits.max())
    with np.errstate(over="ignore"):  # next to 0 the rest falls to -inf, which weighs nothing
        scaled = best / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    probabilities = weights / weights.sum()
    # Nucleus: the smallest set of best tokens that reaches top_p (Holtzman et al., 1904.09751).
    if sampling.top_p < 1:
        kept = int(np.searchsorted(probabilities.cumsum(), sampling.top_p)) + 1
        order, probabilities = order[:kept], probabilities[:kept]
    return int(generator.choice(order, p=probabilities / probabilities.sum()))
