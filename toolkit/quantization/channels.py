"""8-bit products with one scale per output of the weight and one per row of the input.

`NAME.int8_channels` holds uint8 codes [inputs, outputs], as ONNX's MatMulInteger takes them, and
`NAME.int8_channels.scale` [outputs]: weight = (code - 128) * scale. Such a weight says more than
blockwise.py's do: what is multiplied by it is rounded to 8 bits too, when it runs, each row of its
last axis by its own largest value. So a row's result does not depend on the rows beside it. The
product is of integers, which `RoundRows` reproduces in the reference.

Unsigned codes are right in every runtime: on x86 without VNNI, products of unsigned by signed ones
saturate.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array, Ops, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.quantization.row_pieces import largest_by_output, row_pieces

SUFFIX = ".int8_channels"
ZERO_POINT = 128
LARGEST = 127  # codes are 1 to 255: the zero point, and as many steps on each side
SMALLEST = 1e-30  # stands for the largest value of a row or channel of zeros


def scales(weight: Array) -> Array:
    """float32 [outputs]: a step of each output of `weight` [inputs, outputs]."""
    largest = largest_by_output(weight)
    return np.asarray(np.maximum(largest, np.float32(SMALLEST)) / np.float32(LARGEST))


def codes(weight: Array, steps: Array) -> Iterator[Array]:
    """uint8 codes of `weight` in pieces along the inputs, rounded to nearest."""
    for rows in row_pieces(weight):
        yield (np.rint(rows / steps) + np.float32(ZERO_POINT)).astype(np.uint8)


def dequantize(stored: Array, steps: Array) -> Array:
    """float32 [inputs, outputs] from codes and scales; no second one in memory beside it."""
    weight = stored.astype(np.float32)
    weight -= ZERO_POINT
    weight *= steps.astype(np.float32)
    return np.asarray(weight)


def round_rows(x: Array) -> Array:
    """x [..., D], each row rounded to 127 steps on each side of zero."""
    values = x.astype(np.float32)
    largest = np.abs(values).max(-1, keepdims=True, initial=0)
    steps = np.maximum(largest, np.float32(SMALLEST)) / np.float32(LARGEST)
    return np.asarray(np.rint(values / steps) * steps)


class RoundRows(Wrapper[Array]):
    """The reference for weights of this storage: rounds the input of every linear that has one.

    stored: the keys of such weights.
    """

    def __init__(self, inner: Ops[Array], component: str, stored: Set[str]) -> None:
        super().__init__(inner, component)
        self._stored = stored

    def linear(self, x: Array, w: Weights[Array]) -> Array:
        rounded = w.key("weight") in self._stored
        return self.inner.linear(round_rows(x) if rounded else x, w)
