"""GPTQ: rounding one input channel after another, each error made up for by the channels to come.

Frantar et al., arXiv 2210.17323: of a linear with inputs X, rounding channel i of the weight costs
least if the channels after it change by the error times row i of U, where (X^T X)^-1 = U^T U and U
is upper triangular.

The inputs X are those that rounded layers before give. Where the float model's are Z, the linear is
to give Z W, so what is rounded is W + (X^T X)^-1 X^T (Z - X) W, which comes nearest (GPTAQ, Li et
al., arXiv 2504.02692): errors of the layers before are made up for as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edgevlm.calibration import steps
from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.blockwise import StorageFormat
from edgevlm.toolkit.quantization.coded import Codes

# Of the mean of the diagonal, added to it. GPTQ has 0.01, with which other text costs more here.
DAMPING = 0.05
_SMALL = 64  # half the size of what is inverted at once
_AT_ONCE = 128  # channels whose errors reach the later ones together; a multiple of every block


@dataclass(frozen=True)
class Rounded:
    """A rounded weight, and what it costs: error of the outputs over the outputs, squared."""

    codes: Codes
    error: float


def second_moments(inputs: Sequence[Array], path: str) -> Array:
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


def shift(inputs: Sequence[Array], plain: Sequence[Array]) -> Array:
    """X^T (Z - X), float32 [D, D], of inputs X and the float model's own, Z."""
    width = inputs[0].shape[-1]
    total = np.zeros((width, width), np.float32)
    for x, z in zip(inputs, plain, strict=True):
        rows = x.reshape(-1, width)
        total += rows.T @ (z.reshape(-1, width) - rows)
    return total


@dataclass
class Inputs:
    """What is known of a linear's inputs: second moments; shifted, `shift`, where layers before are
    rounded. Linears with the same input share it, as it is costly to invert.
    """

    moments: Array
    path: str
    shifted: Array | None = None
    _roots: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    def root(self, block: int) -> tuple[Array, Array]:
        """The order in which channels are rounded in such blocks, and U of channels in that order.

        Raises CalibrationError if the moments are too few samples' to be inverted.
        """
        if block not in self._roots:
            order = loudest_first(self.moments, block)
            upper = inverse_root(self.moments[np.ix_(order, order)], self.path)
            self._roots[block] = order, upper
        return self._roots[block]

    def costs(self, block: int) -> Array:
        """What a squared error of each channel costs [inputs], with others making up for it."""
        order, upper = self.root(block)
        found = np.empty(len(order), np.float32)
        found[order] = 1 / np.square(np.diag(upper))
        return found


def compensated(matrix: Array, inputs: Inputs, storage: StorageFormat) -> Rounded:
    """A weight [inputs, outputs] in `storage`.

    Channels whose input is always zero are rounded to nearest: nothing is known about them. Raises
    CalibrationError if the inputs are too few or too alike.
    """
    block = storage.block_in(len(matrix))
    assert block is not None
    order, upper = inputs.root(block)
    weight = np.array(matrix[order], np.float32)
    if inputs.shifted is not None:
        missing = inputs.shifted @ np.asarray(matrix, np.float32)
        weight += upper.T @ (upper @ missing[order])
    into, wanted = _Into(weight.shape, block, order), weight.copy()
    for start in range(0, len(weight), _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, len(weight)))
        errors = _round_part(weight, upper, part, storage, into)
        weight[part.stop :] -= upper[part, part.stop :].T @ errors
    found = steps.stored(into.codes, into.scales, into.zeros, storage)
    target = np.empty_like(wanted)
    target[order] = wanted
    return Rounded(found, output_error(target, found.floats(), inputs.moments))


def loudest_first(moments: Array, block: int) -> Array:
    """The order in which channels are rounded [inputs]: blocks by the sum of their inputs' squares,
    and so within each.

    What is rounded first is made up for by most. GPTQ's act-order permutes single channels, and the
    runtime has to permute inputs; blocks stay whole here, so nothing has to.
    """
    blocks = np.diag(moments).reshape(-1, block)
    within = np.argsort(-blocks, axis=1, kind="stable")
    among = np.argsort(-blocks.sum(1), kind="stable")
    return np.asarray((among[:, None] * block + within[among]).ravel())


class _Into:
    """Codes [inputs, outputs], and scales and zero points [blocks, outputs], to be filled.

    order: the channel that is rounded at each step.
    """

    def __init__(self, shape: tuple[int, ...], block: int, order: Array) -> None:
        self.block, self.order = block, order
        self.codes = np.empty(shape, np.uint8)
        blocks = (shape[0] // block, shape[1])
        self.scales, self.zeros = np.empty(blocks, np.float32), np.empty(blocks, np.uint8)


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
        group = into.order[i] // into.block
        if i % into.block == 0:
            whole = slice(i, i + into.block)
            costs = 1 / np.diag(upper)[whole] ** 2  # of an error, once the rest has made up for it
            into.scales[group], into.zeros[group] = steps.best(weight[whole], costs, storage)
        scale, zero = into.scales[group], into.zeros[group]
        code = steps.codes(weight[i], scale, zero, storage)
        into.codes[into.order[i]] = code
        error = errors[i - part.start]
        np.divide(weight[i] - steps.values(code, scale, zero), upper[i, i], out=error)
        rest = slice(i + 1, part.stop)
        weight[rest] -= upper[i, rest, None] * error
    return errors


def inverse_root(moments: Array, path: str) -> Array:
    """U [inputs, inputs], upper triangular, with (moments + damping)^-1 = U^T U. Raises
    CalibrationError, naming `path`, where there is none.
    """
    damped = np.array(moments)
    diagonal = np.einsum("ii->i", damped)
    diagonal[diagonal == 0] = diagonal.mean()
    diagonal += DAMPING * diagonal.mean()
    try:  # of the matrix with its channels reversed, whose root is lower triangular
        root = np.linalg.cholesky(damped[::-1, ::-1])
    except np.linalg.LinAlgError:
        raise CalibrationError(
            f"the inputs of {path} are too few or too alike", hint="calibrate with more text"
        ) from None
    return np.ascontiguousarray(_inverse(root)[::-1, ::-1])


def _inverse(lower: Array) -> Array:
    """Of a lower triangular matrix; NumPy's own takes six times as many operations."""
    half = len(lower) // 2
    if half < _SMALL:
        return np.tril(np.linalg.inv(lower))
    first, last = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    found = np.zeros_like(lower)
    found[:half, :half], found[half:, half:] = first, last
    found[half:, :half] = -last @ (lower[half:, :half] @ first)
    return found


def output_error(matrix: Array, rounded: Array, moments: Array) -> float:
    """|X (W - Q)|^2 / |X W|^2."""
    change = np.asarray(matrix - rounded, np.float32)
    cost, size = (float(np.vdot(x, moments @ x)) for x in (change, np.asarray(matrix, np.float32)))
    return cost / max(size, 1e-30)
