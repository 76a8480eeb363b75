"""What would make int8_rows cheaper, for benchmarks/trained.py: tried out in NumPy, not built.

The linears of the layers are rounded as int8_rows rounds them, inputs and weights; a remedy
changes that for some of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import trained_tower as tower
from edgevlm.calibration.many import Many, ManyOps, hidden
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.quantization import blockwise, channels
from edgevlm.toolkit.vlm.components import encoder_component, lm_component

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
IN_TOWER: Mapping[str, Remedy] = {
    "by rows, as int8-rows": Remedy(),
    "down in blocks": Remedy(("mlp/down",)),
    "all in blocks, as int8-blocks": Remedy((*_ALL, "attention/out")),
    "smoothed behind norms": Remedy(smoothed=tuple(NORMED)),
    "the same, factors of random pixels": Remedy(smoothed=tuple(NORMED), random=True),
    "smoothed behind norms, down in blocks": Remedy(("mlp/down",), tuple(NORMED)),
}


@dataclass
class Rounding(ManyOps):
    """The linears of the layers in 8 bits. factors: by path, ones where there are none."""

    blocked: tuple[str, ...]
    factors: Factors

    def __post_init__(self) -> None:
        super().__init__()

    def linear(self, x: Any, w: Weights[Any]) -> Any:
        if not w.path.startswith("layers."):
            return super().linear(x, w) if isinstance(x, Many) else self.inner.linear(x, w)
        weight, many = np.asarray(w["weight"], np.float32), isinstance(x, Many)
        xs: list[Array] = list(x) if many else [x]
        if w.path.endswith(self.blocked):
            block = blockwise.block_of(len(weight))
            assert block is not None
            xs = [channels.round_rows(_in_blocks(x, block)).reshape(x.shape) for x in xs]
            rounded = blockwise.dequantize(*blockwise.quantize(weight.T, 8), 8).T
        else:
            factors = self.factors.get(w.path, np.ones(len(weight), np.float32))
            xs = [channels.round_rows(x / factors) for x in xs]
            weight = weight * factors[:, None]
            steps = channels.scales(weight)
            rounded = channels.dequantize(np.concatenate([*channels.codes(weight, steps)]), steps)
        w = w.replacing(weight=np.ascontiguousarray(rounded))
        return super().linear(Many(xs), w) if many else self.inner.linear(xs[0], w)


@dataclass
class Largest(ManyOps):
    """Notes the largest |x| of each channel of the layers' linears' inputs, by path."""

    found: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def linear(self, x: Any, w: Weights[Any]) -> Any:
        many = isinstance(x, Many)
        if w.path.startswith("layers."):
            rows = (x.joined() if many else x).reshape(-1, len(w["weight"]))
            self.found[w.path] = np.abs(rows).max(0)
        return super().linear(x, w) if many else self.inner.linear(x, w)


def _in_blocks(x: Array, block: int) -> Array:
    return x.reshape(*x.shape[:-1], -1, block)


class Model:
    """A component's weights, and what its linears get. largest: as Largest finds it, by whether
    the samples were random.
    """

    def __init__(self, weights: Mapping[str, Array], largest: Mapping[bool, Factors]) -> None:
        self.weights, self._largest = weights, largest

    def rounding(self, remedy: Remedy) -> Rounding:
        """The ops that round as a remedy says."""
        return Rounding(remedy.blocked, self._factors(remedy))

    def _factors(self, remedy: Remedy) -> Factors:
        """Of a channel, (largest input)^ALPHA / (largest weight)^(1 - ALPHA)."""
        found = {}
        for path, largest in self._largest[remedy.random].items():
            layer, leaf = path.split("/", 1)
            if leaf in remedy.smoothed:
                together = [p for p in NORMED if NORMED[p] == NORMED.get(leaf)] or [leaf]
                paths = [
                    p for p in (f"{layer}/{leaf}" for leaf in together) if _key(p) in self.weights
                ]
                weights = np.max([np.abs(self.weights[_key(p)]).max(1) for p in paths], 0)
                inputs = np.maximum(largest, 1e-3 * np.median(largest))
                found[path] = (inputs**ALPHA / weights ** (1 - ALPHA)).astype(np.float32)
        return found


def _key(path: str) -> str:
    return path.replace("/", ".") + ".weight"


class LanguageModel:
    """That of a float bundle; samples: windows of text that factors are made of."""

    def __init__(self, bundle: Path, samples: Array) -> None:
        source = systems.load(bundle, Options())
        self._lm = lm_component(source.model.lm)
        weights, text = source.weights[self._lm.name], samples[:SAMPLES]
        vocabulary = source.model.lm.config.vocab_size
        random = np.random.default_rng(0).integers(0, vocabulary, text.shape)
        looks = {False: Largest(), True: Largest()}
        for is_random, look in looks.items():
            hidden(self._lm, look, weights, random if is_random else text)
        self._model = Model(weights, {key: look.found for key, look in looks.items()})

    def log_probabilities(self, remedy: Remedy, windows: Array) -> Iterator[Array]:
        """[S - 1, vocab] for each window, its layers rounded."""
        weights = self._model.weights
        table = np.asarray(weights["embed.weight"], np.float32)
        for x in hidden(self._lm, self._model.rounding(remedy), weights, windows):
            logits = x[0, :-1] @ table.T
            logits -= logits.max(-1, keepdims=True)
            yield logits - np.log(np.exp(logits).sum(-1, keepdims=True))


class Tower:
    """The encoder of a float bundle; samples: pictures that factors are made of."""

    def __init__(self, bundle: Path, samples: Sequence[Any]) -> None:
        source = systems.load(bundle, Options())
        self._images, name = source.model.images, source.model.encoders[0].name
        self._encoder = encoder_component(source.model.encoders[0])
        weights = source.weights[self._encoder.name]
        pixels = tower.pixels(source.model.images, name, samples)
        random = np.asarray(np.random.default_rng(0).standard_normal(pixels.shape, np.float32))
        looks = {False: Largest(), True: Largest()}
        for is_random, look in looks.items():
            self._run(look, weights, random if is_random else pixels)
        self._name = name
        self._model = Model(weights, {key: look.found for key, look in looks.items()})

    def features(self, remedy: Remedy | None, pictures: Sequence[Any]) -> Array:
        """[N, tokens, width], in float without a remedy."""
        ops = Largest() if remedy is None else self._model.rounding(remedy)
        pixels = tower.pixels(self._images, self._name, pictures)
        return self._run(ops, self._model.weights, pixels)

    def _run(self, ops: Any, weights: Mapping[str, Array], pixels: Array) -> Array:
        (output,) = self._encoder.forward(ops, Weights(weights), {"pixels": pixels}).values()
        return np.asarray(output)
