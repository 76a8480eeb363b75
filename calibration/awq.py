"""AWQ: channels that are loud get finer steps, by scaling weights before they are rounded.

Lin et al., arXiv 2306.00978: row j of a linear's weight is multiplied by s_j = mean|x_j|^alpha, and
what is in front of it (smooth.py) divides its output by s_j, so that in float the model stays the
same. The exponent is the one whose rounded weights, divided by s again, cost the outputs least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgevlm.calibration import steps
from edgevlm.calibration.smooth import Link
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.blockwise import StorageFormat

ALPHAS = np.linspace(0, 1, 11, dtype=np.float32)
_QUIETEST = 1e-4  # of the loudest channel: a silent one is not made loud
_OUTPUTS = 256  # of each linear, spread evenly, say as much about an exponent as all


def scales(
    link: Link,
    inputs: Sequence[Array],
    costs: Array,
    weights: Mapping[str, Array],
    storages: Mapping[str, StorageFormat],
) -> Array:
    """s [inputs] of a link, float32: all ones where no other exponent is better.

    inputs: the samples' [..., inputs]. costs [inputs]: what the squared change of a channel's
    weights costs the outputs, where channels are taken to be independent of each other. storages:
    of the linears that read them, by key.
    """
    loudness = np.asarray(sum(np.abs(x.reshape(-1, x.shape[-1])).sum(0) for x in inputs))
    parts = {key: _spread(np.asarray(weights[key], np.float32)) for key in link.linears}
    best, least = np.ones(len(costs), np.float32), np.inf
    for alpha in ALPHAS:
        found = _normal(loudness, alpha)
        cost = sum(
            _cost(part, found, costs, storages[key]) * size for key, (part, size) in parts.items()
        )
        if cost < least:
            best, least = found, cost
    return best


def _spread(matrix: Array) -> tuple[Array, float]:
    """Some outputs of a weight [inputs, outputs], and how many each of them stands for."""
    outputs = matrix.shape[1]
    chosen = np.linspace(0, outputs - 1, min(outputs, _OUTPUTS)).round().astype(np.int64)
    return matrix[:, chosen], outputs / len(chosen)


def _normal(loudness: Array, alpha: np.float32) -> Array:
    """loudness^alpha, as far above one as below."""
    found = np.maximum(loudness, _QUIETEST * loudness.max()) ** alpha
    return np.asarray(found / np.sqrt(found.max() * found.min()), np.float32)


def _cost(matrix: Array, found: Array, costs: Array, storage: StorageFormat) -> float:
    """What it costs if a weight is scaled, rounded to nearest and scaled back."""
    scaled = matrix * found[:, None]
    rounded = steps.nearest(scaled, storage, costs / found**2).floats()
    return float(costs @ np.square((scaled - rounded) / found[:, None]).sum(1))
