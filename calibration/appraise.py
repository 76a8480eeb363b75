"""What rounding costs: layer by layer on the float model's inputs, and at components' outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgevlm.calibration import greedy
from edgevlm.calibration.chain import ANSWER
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.quantization.quantize import Quantize
from edgevlm.toolkit.vlm.components import EMBEDDING

_PIECE = 1 << 22  # values that are compared at a time
_CENTERED = "logits"  # a constant added to a row means nothing
_MASKS = "masks"  # logits: a mask is where they are above 0


@dataclass
class Compared:
    """Sums over pairs of arrays, (float, rounded)."""

    error: float = 0.0
    plain: float = 0.0
    rounded: float = 0.0
    product: float = 0.0

    def add(self, a: Array, b: Array) -> None:
        """Add a pair of one shape."""
        a, b = a.reshape(-1), b.reshape(-1)
        for start in range(0, a.size, _PIECE):
            p, q = (x[start : start + _PIECE].astype(np.float64) for x in (a, b))
            self.error += float(np.square(p - q).sum())
            self.plain += float(p @ p)
            self.rounded += float(q @ q)
            self.product += float(p @ q)

    @property
    def sums(self) -> list[float]:
        """All of it."""
        return [self.error, self.plain, self.rounded, self.product]

    @property
    def relative_rms(self) -> float:
        """Root mean square of the difference, over that of the float values."""
        return float(np.sqrt(self.error / max(self.plain, 1e-24)))

    @property
    def cosine(self) -> float:
        """Of the two as vectors."""
        return self.product / max(float(np.sqrt(self.plain * self.rounded)), 1e-24)


@dataclass
class LayerError:
    """What rounding does to the outputs of one layer.

    shift: sum over rows of (float - rounded), by output channel; rows: how many.
    """

    compared: Compared = field(default_factory=Compared)
    shift: Array = field(default_factory=lambda: np.zeros(0))
    rows: int = 0


class Appraise(Wrapper[Any]):
    """Runs the float model, and beside it each layer of `plan` rounded, on the same input.

    weights: the arrays by key, biases corrected if they are to be. errors: filled, by path.
    """

    def __init__(
        self,
        inner: Ops[Any],
        component: str,
        plan: PrecisionPlan,
        weights: Mapping[str, Array],
        read: Callable[[Any], Array],
        errors: dict[str, LayerError],
        biases: Mapping[str, Any],
    ) -> None:
        super().__init__(inner, component)
        self._rounded = Quantize(inner, component, plan, weights.__getitem__)
        self._plan = plan
        self._read = read
        self._errors = errors
        self._biases = biases

    def linear(self, x: Any, w: Weights[Any]) -> Any:
        y = self.inner.linear(x, w)
        if self._plan.at(self.path_of(w)) != "float":
            self._add(w, y, self._rounded.linear(x, self._corrected(w)), axis=-1)
        return y

    def conv(self, x: Any, w: Weights[Any], **sizes: int) -> Any:
        y = self.inner.conv(x, w, **sizes)
        if self._plan.at(self.path_of(w)) != "float":
            self._add(w, y, self._rounded.conv(x, self._corrected(w), **sizes), axis=1)
        return y

    def layer_merge(self, xs: Any, w: Weights[Any], eps: float) -> Any:
        """In float, as it is recorded."""
        return self.inner.layer_merge(xs, w, eps)

    def _corrected(self, w: Weights[Any]) -> Weights[Any]:
        bias = self._biases.get(w.key("bias"))
        return w if bias is None else w.replacing(bias=bias)

    def _add(self, w: Weights[Any], y: Any, z: Any, axis: int) -> None:
        found = self._errors.setdefault(self.path_of(w), LayerError())
        plain, rounded = self._read(y), self._read(z)
        found.compared.add(plain, rounded)
        difference = plain - rounded
        others = tuple(i for i in range(difference.ndim) if i != axis % difference.ndim)
        shift = difference.sum(others, dtype=np.float64)
        found.shift = found.shift + shift if found.rows else shift
        found.rows += difference.size // len(shift)


@dataclass
class Whole:
    """What rounding does to a model: to single layers, and to the outputs of components, the float
    model's beside the rounded one's, errors of earlier components included.

    kl, same: sums over `scored` positions of logits; losses: sums of the negative log-likelihood
    of the tokens that follow `read` of them, which are of texts, in float and rounded. answers: of
    the float model that both read; same_answers: those that the rounded one gives; same_tokens:
    those before it would say something else, in all. mask_both, mask_either: pixels of masks, as
    the decoder gives them, that both models have, and that one of them has. embeddings: of a tower
    by itself; turned: the sum of 1 - cosine of each to the float model's; most_turned: the largest.
    """

    layers: dict[str, LayerError] = field(default_factory=dict)
    components: dict[str, Compared] = field(default_factory=dict)
    kl: float = 0.0
    same: int = 0
    scored: int = 0
    losses: tuple[float, float] = (0.0, 0.0)
    read: int = 0
    answers: int = 0
    same_answers: int = 0
    same_tokens: int = 0
    mask_both: int = 0
    mask_either: int = 0
    embeddings: int = 0
    turned: float = 0.0
    most_turned: float = 0.0

    def add(
        self,
        plain: Mapping[str, Mapping[str, Array]],
        rounded: Mapping[str, Mapping[str, Array]],
        following: Array | None = None,
    ) -> None:
        """Add what one sample gave; following: the token behind each position, -1 for none."""
        for name, outputs in plain.items():
            for port, a in outputs.items():
                b = rounded[name][port]
                if port == ANSWER:
                    self._answer(a[0].argmax(-1), b[0].argmax(-1))
                    continue
                if port == _MASKS:
                    self.mask_both += int(((a > 0) & (b > 0)).sum())
                    self.mask_either += int(((a > 0) | (b > 0)).sum())
                if port == EMBEDDING:
                    self._embedding(a, b)
                if port == _CENTERED:
                    self._logits(a[0], b[0], following)
                    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
                self.components.setdefault(name, Compared()).add(a, b)

    @property
    def growth(self) -> float:
        """By how much perplexity grows on text like the float model's own: exp(KL) - 1."""
        return float(np.expm1(self.kl / max(self.scored, 1)))

    @property
    def mask_iou(self) -> float | None:
        """Of the masks of both models, all together; None without any."""
        return self.mask_both / self.mask_either if self.mask_either else None

    @property
    def cost(self) -> float:
        """What budgets limit: the growth, or of a tower by itself the mean of 1 - cosine."""
        return self.turned / self.embeddings if self.embeddings else self.growth

    def arrays(self) -> dict[str, Array]:
        """All of it, see unfinished.Found."""
        found = {"component " + name: np.array(c.sums) for name, c in self.components.items()}
        for path, error in self.layers.items():
            found["layer " + path] = np.array([*error.compared.sums, float(error.rows)])
            found["shift " + path] = error.shift
        said = (self.answers, self.same_answers, self.same_tokens)
        sums = (self.kl, *self.losses, *map(float, (self.same, self.scored, self.read, *said)))
        masks = np.array([self.mask_both, self.mask_either], np.int64)
        turned = np.array([float(self.embeddings), self.turned, self.most_turned])
        return {**found, "logits": np.array(sums), "masks": masks, "embeddings": turned}

    def fill(self, arrays: Mapping[str, Array]) -> None:
        """The inverse, in place: wrappers hold `layers`."""
        for key, array in arrays.items():
            kind, _, name = key.partition(" ")
            if kind == "component":
                self.components[name] = Compared(*map(float, array))
            elif kind == "layer":
                *sums, rows = (float(x) for x in array)
                shift = np.array(arrays["shift " + name])
                self.layers[name] = LayerError(Compared(*sums), shift, int(rows))
        self.kl, before, after, *counts = (float(x) for x in arrays["logits"])
        self.losses, (self.same, self.scored, self.read, *said) = (before, after), map(int, counts)
        self.answers, self.same_answers, self.same_tokens = said
        self.mask_both, self.mask_either = (int(x) for x in arrays["masks"])
        count, self.turned, self.most_turned = (float(x) for x in arrays["embeddings"])
        self.embeddings = int(count)

    def _embedding(self, plain: Array, rounded: Array) -> None:
        for a, b in zip(plain, rounded, strict=True):
            pair = Compared()
            pair.add(a, b)
            self.embeddings += 1
            self.turned += 1 - pair.cosine
            self.most_turned = max(self.most_turned, 1 - pair.cosine)

    def _answer(self, plain: Array, rounded: Array) -> None:
        until = greedy.same_until(plain, rounded)
        self.answers += 1
        self.same_answers += until == len(plain)
        self.same_tokens += until

    def _logits(self, a: Array, b: Array, following: Array | None) -> None:
        for row in range(len(a)):  # one at a time: vocabularies are large
            p, q = _log_softmax(a[row]), _log_softmax(b[row])
            self.kl += float((np.exp(p) * (p - q)).sum())
            if following is not None and following[row] >= 0:
                at = int(following[row])
                self.losses = (self.losses[0] - float(p[at]), self.losses[1] - float(q[at]))
                self.read += 1
        self.same += int((a.argmax(-1) == b.argmax(-1)).sum())
        self.scored += len(a)


def _log_softmax(x: Array) -> Array:
    """Along the last axis."""
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))
