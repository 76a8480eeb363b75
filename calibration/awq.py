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


def scales(
    link: Link,
    inputs: Sequence[Array],
    weights: Mapping[str, Array],
    storages: Mapping[str, StorageFormat],
) -> Array:
    """s [inputs] of a link, float32: all ones where no other exponent is better.

    inputs: the samples' [..., inputs]; storages: of the linears that read them, by key. Errors of
    channels are taken to be independent of each other: of an output's squared error, channel j has
    sum(x_j^2) times the square of its weight's change.
    """
    rows = [x.reshape(-1, x.shape[-1]) for x in inputs]
    loudness = sum(np.abs(x).sum(0) for x in rows)
    energy = sum(np.square(x).sum(0) for x in rows)
    matrices = {key: np.asarray(weights[key], np.float32) for key in link.linears}
    best, least = np.ones(len(energy), np.float32), np.inf
    for alpha in ALPHAS:
        found = _normal(np.asarray(loudness), alpha)
        cost = sum(
            _cost(matrix, found, np.asarray(energy), storages[key])
            for key, matrix in matrices.items()
        )
        if cost < least:
            best, least = found, cost
    return best


def _normal(loudness: Array, alpha: np.float32) -> Array:
    """loudness^alpha, as far above one as below."""
    found = np.maximum(loudness, _QUIETEST * loudness.max()) ** alpha
    return np.asarray(found / np.sqrt(found.max() * found.min()), np.float32)


def _cost(matrix: Array, found: Array, energy: Array, storage: StorageFormat) -> float:
    """Squared error of outputs if a weight is scaled, rounded to nearest and scaled back."""
    scaled = matrix * found[:, None]
    change = (scaled - steps.nearest(scaled, storage).floats()) / found[:, None]
    return float(energy @ np.square(change).sum(1))
