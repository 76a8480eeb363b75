"""How good a language model is in other weights: on text that was not calibrated with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgevlm.calibration.many import Many, ManyOps, hidden
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.vlm.components import Component


@dataclass(frozen=True)
class Quality:
    """On held-out tokens: perplexity of the float model and in these weights, the mean
    Kullback-Leibler divergence to the float model, and how often the likeliest token is the same.
    """

    tokens: int
    perplexity_float: float
    perplexity: float
    kl: float
    same_top_1: float

    @property
    def growth(self) -> float:
        """By how much the perplexity grew: 0.05 for 5 %; infinite where it is no number."""
        growth = self.perplexity / self.perplexity_float - 1
        return growth if np.isfinite(growth) else float("inf")


def compare(
    lm: Component,
    plain: Mapping[str, Array],
    rounded: Mapping[str, Array],
    windows: Array,
    progress: Callable[[str], None],
    known: Many | None = None,
) -> Quality:
    """The language model in `rounded` weights beside that in `plain` ones, on windows of ids.

    known: what `hidden` gives for the plain weights, if that was computed before.
    """
    states = [
        known or hidden(lm, ManyOps(), plain, windows),
        hidden(lm, ManyOps(), rounded, windows),
    ]
    sums = np.zeros(4)
    for number, window in enumerate(windows):
        a, b = (
            _log_probabilities(lm, weights, x[number])
            for weights, x in zip((plain, rounded), states, strict=True)
        )
        at, following = np.arange(len(window) - 1), window[1:]
        sums += (
            -float(a[at, following].sum()),
            -float(b[at, following].sum()),
            float((np.exp(a) * (a - b)).sum()),
            float((a.argmax(-1) == b.argmax(-1)).sum()),
        )
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    before, after, kl, same = (float(x) / tokens for x in sums)
    found = Quality(tokens, float(np.exp(before)), float(np.exp(after)), kl, same)
    progress(f"perplexity {found.perplexity_float:.2f} -> {found.perplexity:.2f}")
    return found


def _log_probabilities(lm: Component, weights: Mapping[str, Array], x: Array) -> Array:
    """[S - 1, vocab] of the tokens that follow, from the output of the last norm."""
    w: Weights[Array] = Weights(weights)
    ops = NumpyOps()
    tied = "head.weight" not in lm.shapes
    logits = ops.unembed(x[0], w / "embed") if tied else ops.linear(x[0], w / "head")
    logits = logits[:-1] - logits[:-1].max(-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
