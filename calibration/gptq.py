"""GPTQ: rounding one input channel after another, each error made up for by the channels to come.

Frantar et al., arXiv 2210.17323: of a linear with inputs X, rounding channel i of the weight costs
least if the channels after it change by the error times row i of U, where (X^T X)^-1 = U^T U and U
is upper triangular.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.blockwise import ZERO_POINT, StorageFormat
from edgevlm.toolkit.quantization.coded import Codes

DAMPING = 0.01  # of the mean of the diagonal, added to it
_AT_ONCE = 128  # channels whose errors reach the later ones together; a multiple of every block


@dataclass(frozen=True)
class Rounded:
    """A rounded weight, and what it costs: error of the outputs over the outputs, squared."""

    codes: Codes
    error: float


def second_moments(inputs: list[Array], path: str) -> Array:
    """X^T X, float32, of the rows of all `inputs` [..., D]; CalibrationError for broken ones."""
    width = inputs[0].shape[-1]
    total = np.zeros((width, width), np.float32)
    for x in inputs:
        rows = x.reshape(-1, width)
        total += rows.T @ rows
    if not np.isfinite(total).all():
        raise CalibrationError(
            f"the input of {path} has values that are no numbers",
            hint="the model breaks on this text; try another, or check the float model",
        )
    if not total.any():
        raise CalibrationError(
            f"the input of {path} is zero for every sample", hint="calibrate with other samples"
        )
    return total


def compensated(matrix: Array, moments: Array, storage: StorageFormat, path: str) -> Rounded:
    """A weight [inputs, outputs] in `storage`, of inputs with these second moments.

    Channels whose input is always zero are rounded to nearest: nothing is known about them.
    Raises CalibrationError if the moments are too few samples' to be inverted.
    """
    weight = np.array(matrix, np.float32)
    upper = _inverse_root(moments, path)
    block = storage.block_in(len(weight))
    assert block is not None
    into = _Into(np.empty(weight.shape, np.uint8), block)
    for start in range(0, len(weight), _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, len(weight)))
        errors = _round_part(weight, upper, part, storage, into)
        weight[part.stop :] -= upper[part, part.stop :].T @ errors
    scales = np.ascontiguousarray(into.scales.T)
    zeros = _stored(into.zeros, storage) if storage.zero_points else None
    found = Codes(storage, _stored(into.codes, storage), scales, zeros)
    return Rounded(found, output_error(matrix, found.floats(), moments))


def _stored(codes: Array, storage: StorageFormat) -> Array:
    """Codes or zero points [..., outputs] as a file has them: by output, packed."""
    rows = np.ascontiguousarray(codes.T)
    return rows if storage.bits == 8 else blockwise.pack(rows)


class _Into:
    """Codes [inputs, outputs], and scales and zero points [blocks, outputs], to be filled."""

    def __init__(self, codes: Array, block: int) -> None:
        self.codes, self.block = codes, block
        shape = (len(codes) // block, codes.shape[1])
        self.scales, self.zeros = np.empty(shape, np.float32), np.empty(shape, np.uint8)

    def begin(self, group: int, weights: Array, storage: StorageFormat) -> None:
        """Choose the scales and zero points of a block of weights [inputs, outputs]."""
        if storage.zero_points:
            self.scales[group], self.zeros[group] = blockwise.ranges_of(weights.T, storage.bits)
        else:
            self.scales[group] = blockwise.scales_of(weights.T, storage.bits)
            self.zeros[group] = ZERO_POINT[storage.bits]


def _round_part(
    weight: Array,
    upper: Array,
    part: slice,
    storage: StorageFormat,
    into: _Into,
) -> Array:
    """Round the channels `part` of `weight` into codes and scales; their errors."""
    errors = np.empty((part.stop - part.start, weight.shape[1]), np.float32)
    for i in range(part.start, part.stop):
        group = i // into.block
        if i % into.block == 0:
            into.begin(group, weight[i : i + into.block], storage)
        scale, zero = into.scales[group], into.zeros[group].astype(np.float32)
        step = np.where(scale == 0, np.float32(1), scale)
        code = np.clip(np.rint(weight[i] / step) + zero, 0, 2**storage.bits - 1)
        into.codes[i] = code
        error = errors[i - part.start]
        np.divide(weight[i] - (code - zero) * scale, upper[i, i], out=error)
        rest = slice(i + 1, part.stop)
        weight[rest] -= upper[i, rest, None] * error
    return errors


def _inverse_root(moments: Array, path: str) -> Array:
    """U, upper triangular, with (moments + damping)^-1 = U^T U."""
    damped = np.array(moments)
    diagonal = np.einsum("ii->i", damped)
    diagonal[diagonal == 0] = diagonal.mean()
    diagonal += DAMPING * diagonal.mean()
    try:  # of the matrix with its channels reversed, whose root is lower triangular
        root = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError:
        raise CalibrationError(
            f"the inputs of {path} are too few or too alike", hint="calibrate with more text"
        ) from None
    return np.triu(np.linalg.inv(root))


def output_error(matrix: Array, rounded: Array, moments: Array) -> float:
    """|X (W - Q)|^2 / |X W|^2."""
    change = np.asarray(matrix - rounded, np.float32)
    cost, size = (float(np.vdot(x, moments @ x)) for x in (change, np.asarray(matrix, np.float32)))
    return cost / max(size, 1e-30)
