"""8-bit inputs and weights in steps known beforehand: the static INT8 that TensorRT takes.

`NAME.int8_static` holds int8 codes of a linear's or convolution's weight in the weight's own shape,
`NAME.int8_static.scale` [outputs] a step per output channel, and `NAME.int8_static.input` [] the
step of what is multiplied by it, from the plan's ranges. Every zero point is 0. A graph has
QuantizeLinear and DequantizeLinear around the input and DequantizeLinear after the codes; biases,
and the results of products, stay in float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper

SUFFIX = ".int8_static"
INPUT = ".input"
LARGEST = 127  # codes of weights are -127 to 127; those of inputs may be -128 too
SMALLEST = 1e-5  # stands for smaller ranges: less would be 0 where steps are stored in half
_PIECE = 1 << 24  # weights that are quantized at a time


def channel_axis(shape: Sequence[int]) -> int:
    """The axis of the outputs: a linear is [inputs, outputs], a convolution [outputs, ...]."""
    return 1 if len(shape) == 2 else 0


def scales(weight: Array) -> Array:
    """float32 [outputs]: a step of each output channel of `weight`."""
    axis = channel_axis(weight.shape)
    if axis == 0:
        largest = np.abs(weight.astype(np.float32)).reshape(len(weight), -1).max(1)
    else:
        largest = np.zeros(weight.shape[1], np.float32)
        for rows in _pieces(weight):
            np.maximum(largest, np.abs(rows).max(0), out=largest)
    return np.asarray(np.maximum(largest, np.float32(SMALLEST)) / np.float32(LARGEST))


def codes(weight: Array, steps: Array) -> Iterator[Array]:
    """int8 codes of `weight` in pieces along its first axis, rounded to nearest."""
    if channel_axis(weight.shape) == 0:
        along = steps.reshape(-1, *[1] * (weight.ndim - 1))
        yield np.rint(weight.astype(np.float32) / along).astype(np.int8)
        return
    for rows in _pieces(weight):
        yield np.rint(rows / steps).astype(np.int8)


def _pieces(weight: Array) -> Iterator[Array]:
    step = max(_PIECE // max(weight.shape[1], 1), 1)
    for start in range(0, weight.shape[0], step):
        yield weight[start : start + step].astype(np.float32)


def dequantize(stored: Array, steps: Array) -> Array:
    """The float32 weight that codes and steps stand for; no second one in memory beside it."""
    shape = [1] * stored.ndim
    shape[channel_axis(stored.shape)] = -1
    weight = stored.astype(np.float32)
    weight *= steps.astype(np.float32).reshape(shape)
    return np.asarray(weight)


def input_step(ranges: Mapping[str, float], path: str) -> Array:
    """float32 []: the step of the input of the layer at `path`.

    Raises CalibrationError if the plan's ranges lack it.
    """
    if path not in ranges:
        raise CalibrationError(
            f"the plan has no range for the input of {path}",
            hint="calibrate again with samples that reach every component",
        )
    return np.asarray(max(ranges[path], SMALLEST) / LARGEST, np.float32)


class RoundInputs(Wrapper[Array]):
    """The reference for weights of this storage: rounds the input of every layer that has one.

    steps: of the input, by the key of such a weight.
    """

    def __init__(self, inner: Ops[Array], component: str, steps: Mapping[str, Array]) -> None:
        super().__init__(inner, component)
        self._steps = steps

    def linear(self, x: Array, w: Weights[Array]) -> Array:
        return self.inner.linear(self._rounded(x, w), w)

    def conv(self, x: Array, w: Weights[Array], **sizes: int) -> Array:
        return self.inner.conv(self._rounded(x, w), w, **sizes)

    def _rounded(self, x: Array, w: Weights[Array]) -> Array:
        step = self._steps.get(w.key("weight"))
        return x if step is None else self.inner.fake_quant(x, step, axis=None, path=w.path)
