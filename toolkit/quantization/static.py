"""8-bit inputs and weights in steps known beforehand: the static INT8 and FP8 that TensorRT takes.

INT8: `NAME.int8_static` holds int8 codes of a linear's or convolution's weight in the weight's own
shape, `NAME.int8_static.scale` [outputs] a step per output channel, and `NAME.int8_static.input` []
the step of what is multiplied by it, from the plan's ranges. FP8: the same as `NAME.fp8_static`,
codes of E4M3 (toolkit/ops/float8.py), with one step for the whole weight, `.scale` []. Every zero
point is 0. A graph has QuantizeLinear and DequantizeLinear around the input and DequantizeLinear
after the codes; biases, and the results of products, stay in float.

A step of FP8 is a power of two. E4M3 is as exact in every binade, so that costs nothing; and it is
exact in half precision too, and so is dividing by it, so that every program rounds alike. One step
serves a whole weight, as channels down to 2^-14 of the largest keep their precision: TensorRT 10
has no products of FP8 with a step per channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops import float8
from edgevlm.toolkit.ops.vocabulary import Array, EightBits, Ops, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.quantization.plan import Precision, PrecisionPlan
from edgevlm.toolkit.quantization.row_pieces import largest_by_output, row_pieces

LARGEST = 127  # codes of INT8 weights are -127 to 127; those of inputs may be -128 too
INPUT = ".input"
SCALE = ".scale"
_SMALLEST = 1e-5  # INT8: stands for smaller ranges: less would be 0 where steps are stored in half
_LEAST_EXPONENT = -14  # FP8: of a step: half precision has no smaller one in full


@dataclass(frozen=True)
class Form:
    """One of the two number formats, with its suffix in the names of stored weights.

    by_channel: whether a weight has a step per output channel.
    """

    to: EightBits
    suffix: str
    by_channel: bool

    def steps(self, largest: Array) -> Array:
        """float32 steps with which the range |x| <= largest is rounded."""
        if self.to == "int8":
            return np.asarray(np.maximum(largest, _SMALLEST) / LARGEST, np.float32)
        least = 2.0**_LEAST_EXPONENT
        needed = np.asarray(largest, np.float64) / float8.ROUNDS_TO_LARGEST
        share, exponent = np.frexp(np.maximum(needed, least))
        exponent = np.where(share == 0.5, exponent - 1, exponent)  # the power of two itself
        return np.asarray(np.ldexp(1.0, exponent), np.float32)

    def codes(self, steps: Array) -> Array:
        """Values in steps as they are stored: int8, or uint8 codes of E4M3."""
        return np.rint(steps).astype(np.int8) if self.to == "int8" else float8.encode(steps)

    def values(self, codes: Array) -> Array:
        """The float32 values of codes, in steps."""
        return codes.astype(np.float32) if self.to == "int8" else float8.decode(codes)


INT8 = Form("int8", ".int8_static", by_channel=True)
FP8 = Form("fp8", ".fp8_static", by_channel=False)
FORMS: Mapping[Precision, Form] = {"int8": INT8, "fp8": FP8}
SUFFIX = INT8.suffix


def form_at(plan: PrecisionPlan, path: str) -> Form | None:
    """The form in which the layer at `path` is; None for any other precision."""
    return FORMS.get(plan.at(path))


def zero_name(to: EightBits, shape: Sequence[int] = ()) -> str:
    """What graphs call the zero points of such a shape, all of which are 0."""
    return ".".join([f"zero.{to}", *map(str, shape)])


def split(tensor: str) -> tuple[str, Form, str] | None:
    """Weight, form and tail ("", .scale, .input) of a stored tensor's name; None for others."""
    for form in FORMS.values():
        weight, found, tail = tensor.rpartition(form.suffix)
        if found and tail in ("", SCALE, INPUT):
            return weight, form, tail
    return None


def channel_axis(shape: Sequence[int]) -> int:
    """The axis of the outputs: a linear is [inputs, outputs], a convolution [outputs, ...]."""
    return 1 if len(shape) == 2 else 0


def scale_shape(shape: Sequence[int], form: Form) -> tuple[int, ...]:
    """The shape of the steps of a weight of `shape`."""
    return (shape[channel_axis(shape)],) if form.by_channel else ()


def scales(weight: Array, form: Form = INT8) -> Array:
    """The steps of `weight`, float32 [outputs], or [] of a form with one for all."""
    axis = channel_axis(weight.shape)
    if axis == 0:
        largest = np.abs(weight.astype(np.float32)).reshape(len(weight), -1).max(1)
    else:
        largest = largest_by_output(weight)
    return form.steps(largest if form.by_channel else np.asarray(largest.max()))


def codes(weight: Array, steps: Array, form: Form = INT8) -> Iterator[Array]:
    """Codes of `weight` in pieces along its first axis, rounded to nearest."""
    if channel_axis(weight.shape) == 0:
        along = steps.reshape(-1, *[1] * (weight.ndim - 1))
        yield form.codes(weight.astype(np.float32) / along)
        return
    for rows in row_pieces(weight):
        yield form.codes(rows / steps)


def dequantize(stored: Array, steps: Array, form: Form = INT8) -> Array:
    """The float32 weight that codes and steps stand for; no second one in memory beside it."""
    shape = [1] * stored.ndim
    shape[channel_axis(stored.shape)] = -1
    weight = form.values(stored)
    weight *= steps.astype(np.float32).reshape(shape)
    return np.asarray(weight)


def input_step(ranges: Mapping[str, float], path: str, form: Form = INT8) -> Array:
    """float32 []: the step of the input of the layer at `path`.

    Raises CalibrationError if the plan's ranges lack it.
    """
    if path not in ranges:
        raise CalibrationError(
            f"the plan has no range for the input of {path}",
            hint="calibrate again with samples that reach every component",
        )
    return form.steps(np.asarray(ranges[path]))


class RoundInputs(Wrapper[Array]):
    """The reference for weights of this storage: rounds the input of every layer that has one.

    steps: of the input, and the weight's form, by the key of such a weight.
    """

    def __init__(
        self, inner: Ops[Array], component: str, steps: Mapping[str, tuple[Array, Form]]
    ) -> None:
        super().__init__(inner, component)
        self._steps = steps

    def linear(self, x: Array, w: Weights[Array]) -> Array:
        return self.inner.linear(self._rounded(x, w), w)

    def conv(self, x: Array, w: Weights[Array], **sizes: int) -> Array:
        return self.inner.conv(self._rounded(x, w), w, **sizes)

    def _rounded(self, x: Array, w: Weights[Array]) -> Array:
        found = self._steps.get(w.key("weight"))
        if found is None:
            return x
        step, form = found
        return self.inner.fake_quant(x, step, axis=None, path=w.path, to=form.to)
