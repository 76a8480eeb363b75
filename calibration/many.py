"""Many samples through a model, op by op: where a weight is used, all of its inputs are there.

So a weight is read once for all samples, and whoever calibrates sees what every sample brings to a
layer before the next one runs. Memory is that of one op's inputs and outputs for all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Ops, R, Step, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.vlm.components import EMBEDDING, Component, no_states


class Many(tuple[Array, ...]):
    """One tensor of a model function: its value for each sample."""

    __slots__ = ()

    def joined(self) -> Array:
        """[1, S, D] of each sample as one of [1, sum of S, D]."""
        return np.concatenate(self, 1)

    def split(self, joined: Array) -> Many:
        """The inverse of `joined`, for a tensor with as many tokens."""
        ends = np.cumsum([x.shape[1] for x in self])[:-1]
        return Many(np.split(joined, ends, 1))


class ManyOps:
    """Runs every op for each sample; those with large weights for all at once.

    Language models and towers: what leaves the former is the output of its last norm (`hidden`),
    and KV caches are not kept.
    """

    def __init__(self, inner: Ops[Array] | None = None) -> None:
        self.inner: Ops[Array] = inner or NumpyOps()

    def __getattr__(self, op: str) -> Any:
        run = getattr(self.inner, op)

        def each(*args: Any, **options: Any) -> Any:
            count = _samples(args)
            if count is None:
                return run(*args, **options)
            return Many(run(*_at(args, i), **options) for i in range(count))

        return each

    def block(self, function: Callable[..., R], w: Weights[Any], *args: Any) -> R:
        return function(self, w, *args)

    def embed(self, ids: Many, w: Weights[Any]) -> Many:
        return ids.split(self.inner.embed(ids.joined(), w))

    def linear(self, x: Many, w: Weights[Any]) -> Many:
        if w.path == "head":
            return x
        if x[0].ndim == 2:  # one row of each sample: a tower's gate over channels
            return Many(np.split(self.inner.linear(np.concatenate(x), w), len(x)))
        return x.split(self.inner.linear(x.joined(), w))

    def unembed(self, x: Many, w: Weights[Any]) -> Many:
        return x

    def attention_cached(
        self, q: Many, k: Many, v: Many, past: Any, step: Step[Any], **options: Any
    ) -> tuple[Many, Any, Any]:
        outputs = (
            self.inner.attention_cached(q[i], k[i], v[i], past, _at(step, i), **options)[0]
            for i in range(len(q))
        )
        return Many(outputs), *past


class Rows(Wrapper[Array]):
    """All rows of an input in one product; NumPy reads the weight for each sample of a batch."""

    def linear(self, x: Array, w: Weights[Array]) -> Array:
        y = self.inner.linear(x.reshape(-1, x.shape[-1]), w)
        return y.reshape(*x.shape[:-1], -1)

    def unembed(self, x: Array, w: Weights[Array]) -> Array:
        y = self.inner.unembed(x.reshape(-1, x.shape[-1]), w)
        return y.reshape(*x.shape[:-1], -1)


def _samples(values: Sequence[Any]) -> int | None:
    """How many samples the first Many among `values`, or lists of them, has; None without any."""
    for value in values:
        if isinstance(value, Many):
            return len(value)
        if isinstance(value, (list, tuple)) and (found := _samples(value)) is not None:
            return found
    return None


def _at(value: Any, i: int) -> Any:
    """What sample `i` has in place of each Many in `value`."""
    if isinstance(value, Many):
        return value[i]
    if isinstance(value, Step):
        return Step(*(_at(x, i) for x in (value.positions, value.mask, value.cos, value.sin)))
    if isinstance(value, (list, tuple)):
        return type(value)(_at(x, i) for x in value)
    return value


def hidden(lm: Component, ops: Any, weights: Any, windows: Array | Many) -> Many:
    """The output of the last norm for each window of token ids [N, S]: N of [1, S, D]. Of a tower
    by itself the embedding [1, channels] of each image [1, 3, height, width].
    """
    if isinstance(windows, Many):
        embedded: Many = lm.forward(ops, Weights(weights), {"pixels": windows})[EMBEDDING]
        return embedded
    count, length = windows.shape
    width = next(port.shape[1] for port in lm.inputs if port.name == "features")
    states = no_states(lm.inputs, lm.outputs, {"batch": 1, "context": length})
    inputs = {
        "ids": Many(windows[:, None]),
        "rows": Many([np.full((1, length), -1)] * count),
        "features": np.zeros((1, int(width)), np.float32),
        "start": np.zeros(1, np.int64),
        "score": Many([np.arange(length)[None]] * count),
        **states,
    }
    found: Many = lm.forward(ops, Weights(weights), inputs)["logits"]
    return found
