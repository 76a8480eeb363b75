"""What entered a layer, as a histogram, and the range that it suggests.

A histogram of |x| has a fixed number of bins up to a power of two, which doubles when a larger
value comes: two bins become one. So memory does not grow with samples, and the result does not
depend on their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.static import INT8, LARGEST, Form

BINS = 2048
PERCENTILE = 0.9999
_LEVELS = LARGEST + 1  # steps of |x|, zero included; E4M3 has 127
_FEWEST = 128  # bins below which a range would have finer steps than the histogram
_CANDIDATES = 128  # ranges that mse and entropy try
_PIECE = 1 << 22  # values counted at a time: early layers of large images have 10^8
_POINTS = 4  # in a bin, at which the error is taken


@dataclass
class Histogram:
    """|x| of everything that entered a layer.

    counts [BINS] of the values above 0, up to `limit`; zeros: how many were 0; largest: exact.
    """

    counts: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))
    limit: float = 0.0
    zeros: int = 0
    largest: float = 0.0

    def add(self, x: Array, path: str) -> None:
        """Count the values of `x`. Raises CalibrationError naming `path` if one is no number."""
        values = x.reshape(-1)
        for start in range(0, values.size, _PIECE):
            self._add(np.abs(values[start : start + _PIECE].astype(np.float32, copy=False)), path)

    def _add(self, sizes: Array, path: str) -> None:
        largest = float(sizes.max())
        if not math.isfinite(largest):
            raise CalibrationError(
                f"the input of {path} has values that are no numbers",
                hint="the model breaks on these samples; try others, or check the float model",
            )
        if largest == 0:
            self.zeros += sizes.size
            return
        self.largest = max(self.largest, largest)
        self._reach(largest)
        at = np.minimum(sizes * np.float32(BINS / self.limit), BINS - 1).astype(np.int32)
        zeros = sizes.size - int(np.count_nonzero(sizes))
        counts = np.bincount(at, minlength=BINS)
        counts[0] -= zeros
        self.counts += counts
        self.zeros += zeros

    def _reach(self, largest: float) -> None:
        """Widen by doubling until `largest` is below the limit."""
        if not self.limit:
            self.limit = 2.0 ** math.floor(math.log2(largest) + 1)
        while largest >= self.limit:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate([pairs, np.zeros(BINS // 2, np.int64)])
            self.limit *= 2


def _minmax(h: Histogram, form: Form = INT8) -> float:
    return h.largest


def _percentile(h: Histogram, form: Form = INT8) -> float:
    """The upper edge of the bin that PERCENTILE of all values, zeros included, do not exceed."""
    below = h.zeros + np.cumsum(h.counts)
    at = int(np.searchsorted(below, PERCENTILE * below[-1]))
    return min((at + 1) / BINS * h.limit, h.largest)


def _candidates(h: Histogram) -> Array:
    """Numbers of bins that a range may have, the last of them all that hold something."""
    used = int(np.flatnonzero(h.counts)[-1]) + 1
    first = min(_FEWEST, used)
    return np.unique(np.linspace(first, used, _CANDIDATES).astype(np.int64))


def _mse(h: Histogram, form: Form = INT8) -> float:
    """The range with the smallest squared error of what is rounded in it and clipped to it."""
    width = h.limit / BINS / _POINTS
    centres = (np.arange(BINS * _POINTS) + 0.5) * width
    counts = np.repeat(h.counts, _POINTS)
    held = counts > 0
    centres, counts = centres[held], counts[held]
    best, found = np.inf, h.largest
    for bins in _candidates(h):
        largest = min(bins / BINS * h.limit, h.largest)
        rounded = _rounded(centres, largest, form)
        error = float((np.square(centres - rounded) * counts).sum())
        if error < best:
            best, found = error, largest
    return found


def _rounded(sizes: Array, largest: float, form: Form) -> Array:
    """|x| rounded in the range up to `largest`, and clipped to it."""
    if form.to == "int8":
        step = largest / LARGEST
        return np.asarray(np.minimum(np.rint(sizes / step), LARGEST) * step)
    steps = form.steps(np.asarray(largest))
    return np.asarray(form.values(form.codes(sizes / steps)) * steps)


def _levels(bins: int, largest: float, form: Form) -> Array:
    """Which of the steps of |x| each of so many bins up to `largest` is rounded to."""
    if form.to == "int8":
        return np.arange(bins) * _LEVELS // bins
    centres = (np.arange(bins) + 0.5) / bins * largest
    return form.codes(centres / form.steps(np.asarray(largest))).astype(np.int64)


def _entropy(h: Histogram, form: Form = INT8) -> float:
    """The range whose rounded histogram diverges least from the clipped one (Kullback-Leibler).

    Migacz, 8-bit inference with TensorRT (GTC 2017): what is beyond the range counts as its last
    bin in the one, and is missing from the other.
    """
    best, found = np.inf, h.largest
    counts = h.counts.astype(np.float64)
    for bins in _candidates(h):
        inside = counts[:bins]
        if not inside.any():
            continue
        clipped = inside.copy()
        clipped[-1] += counts[bins:].sum()
        largest = min(bins / BINS * h.limit, h.largest)
        level = _levels(bins, largest, form)
        filled = inside > 0
        sums = np.bincount(level, inside, _LEVELS)
        shared = np.bincount(level, filled, _LEVELS)
        rounded = np.where(filled, (sums / np.maximum(shared, 1))[level], 0.0)
        divergence = _divergence(clipped, rounded)
        if divergence < best:
            best, found = divergence, largest
    return found


def _divergence(p: Array, q: Array) -> float:
    """KL(p | q) of two histograms, a little of q everywhere so that it is finite."""
    p, q = p / p.sum(), (q + 1e-9 * q.sum()) / (q.sum() * (1 + 1e-9 * len(q)))
    held = p > 0
    return float((p[held] * np.log(p[held] / q[held])).sum())


METHODS: Mapping[str, Callable[..., float]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}


def ranges_of(
    histograms: Mapping[str, Histogram], method: str, form: Form = INT8
) -> dict[str, float]:
    """The range of each layer, by path. Raises CalibrationError for inputs that were always 0."""
    dead = [path for path, histogram in histograms.items() if histogram.largest == 0]
    if dead:
        more = f" (and of {len(dead) - 1} other layers)" if len(dead) > 1 else ""
        raise CalibrationError(
            f"the input of {dead[0]}{more} is zero for every sample",
            hint=f"calibrate with other samples, or leave it in float: --keep-float {dead[0]}",
        )
    return {path: float(METHODS[method](h, form)) for path, h in histograms.items()}
