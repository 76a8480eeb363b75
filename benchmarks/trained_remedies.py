"""What would make int8_rows cheaper, for benchmarks/trained.py: tried out in NumPy, not built.

The linears of the layers are rounded as int8_rows rounds them, inputs and weights; a remedy
changes that for some of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.calibration.many import Many, ManyOps, hidden
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.quantization import blockwise, channels
from edgevlm.toolkit.vlm.components import Component, lm_component

Factors = Mapping[str, Array]
NORMED = {"attention/q": "norm1", "attention/k": "norm1", "attention/v": "norm1",
          "mlp/gate": "norm2", "mlp/up": "norm2"}  # fmt: skip
ALPHA = 0.5  # of SmoothQuant: how much of a channel's size its weights take over
SAMPLES = 8  # windows that factors are made of


@dataclass(frozen=True)
class Remedy:
    """blocked: kinds of linears whose inputs and weights are rounded in blocks of up to 128.

    smoothed: kinds of linears whose input channels are divided by factors before rounding, and
    their weights multiplied (SmoothQuant, Xiao et al., arXiv 2211.10438). The norm before them, or
    `up` before `down`, can divide at no cost. random: factors of random tokens, not of text.
    """

    blocked: tuple[str, ...] = ()
    smoothed: tuple[str, ...] = ()
    random: bool = False


_ALL = (*NORMED, "mlp/down")
REMEDIES: Mapping[str, Remedy] = {
    "by rows, as int8-rows": Remedy(),
    "q, k, v in blocks": Remedy(("attention/q", "attention/k", "attention/v")),
    "down in blocks": Remedy(("mlp/down",)),
    "q, k, v, gate, up in blocks": Remedy(tuple(NORMED)),
    "all in blocks, as int8-blocks": Remedy((*_ALL, "attention/out")),
    "smoothed behind norms": Remedy(smoothed=tuple(NORMED)),
    "smoothed behind norms and in down": Remedy(smoothed=_ALL),
    "the same, factors of random tokens": Remedy(smoothed=_ALL, random=True),
}


@dataclass
class Rounding(ManyOps):
    """The linears of the layers in 8 bits. factors: by path, ones where there are none."""

    blocked: tuple[str, ...]
    factors: Factors

    def __post_init__(self) -> None:
        super().__init__()

    def linear(self, x: Many, w: Weights[Any]) -> Many:
        if not w.path.startswith("layers."):
            return super().linear(x, w)
        weight = np.asarray(w["weight"], np.float32)
        if w.path.endswith(self.blocked):
            block = blockwise.block_of(len(weight))
            assert block is not None
            shape = (1, -1, len(weight) // block, block)
            x = Many(channels.round_rows(one.reshape(shape)).reshape(one.shape) for one in x)
            rounded = blockwise.dequantize(*blockwise.quantize(weight.T, 8), 8).T
        else:
            factors = self.factors.get(w.path, np.ones(len(weight), np.float32))
            x = Many(channels.round_rows(one / factors) for one in x)
            weight = weight * factors[:, None]
            steps = channels.scales(weight)
            rounded = channels.dequantize(np.concatenate([*channels.codes(weight, steps)]), steps)
        return super().linear(x, w.replacing(weight=np.ascontiguousarray(rounded)))


@dataclass
class Largest(ManyOps):
    """Notes the largest |x| of each channel of every linear's input, by path."""

    found: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def linear(self, x: Many, w: Weights[Any]) -> Many:
        if w.path.startswith("layers."):
            self.found[w.path] = np.abs(x.joined()[0]).max(0)
        return super().linear(x, w)


class Model:
    """The language model of a float bundle; samples: windows of text that factors are made of."""

    def __init__(self, bundle: Path, samples: Array) -> None:
        source = systems.load(bundle, Options())
        self._lm: Component = lm_component(source.model.lm)
        self._weights = source.weights[self._lm.name]
        text = samples[:SAMPLES]
        vocabulary = source.model.lm.config.vocab_size
        random = np.random.default_rng(0).integers(0, vocabulary, text.shape)
        self._largest = {False: self._look(text), True: self._look(random)}

    def _look(self, windows: Array) -> dict[str, Array]:
        watch = Largest()
        hidden(self._lm, watch, self._weights, windows)
        return watch.found

    def log_probabilities(self, remedy: Remedy, windows: Array) -> Iterator[Array]:
        """[S - 1, vocab] for each window, its layers rounded."""
        ops = Rounding(remedy.blocked, self._factors(remedy))
        table = np.asarray(self._weights["embed.weight"], np.float32)
        for x in hidden(self._lm, ops, self._weights, windows):
            logits = x[0, :-1] @ table.T
            logits -= logits.max(-1, keepdims=True)
            yield logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def _factors(self, remedy: Remedy) -> Factors:
        """Of a channel, (largest input)^ALPHA / (largest weight)^(1 - ALPHA)."""
        found = {}
        for path, largest in self._largest[remedy.random].items():
            layer, leaf = path.split("/", 1)
            if leaf in remedy.smoothed:
                together = [p for p in NORMED if NORMED[p] == NORMED.get(leaf)] or [leaf]
                weights = np.max([self._sizes(f"{layer}/{p}") for p in together], 0)
                inputs = np.maximum(largest, 1e-3 * np.median(largest))
                found[path] = (inputs**ALPHA / weights ** (1 - ALPHA)).astype(np.float32)
        return found

    def _sizes(self, path: str) -> Array:
        """The largest |w| of each input channel."""
        weight = self._weights[path.replace("/", ".") + ".weight"]
        return np.asarray(np.abs(weight).max(1), np.float32)
