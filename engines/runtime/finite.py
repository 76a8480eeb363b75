"""Outputs that are numbers: NaN or infinite values mean damaged weights, or a format too small."""

from __future__ import annotations

import numpy as np

from edgevlm.engines.backends.tensors import Tensor
from edgevlm.toolkit.errors import AccuracyError
from edgevlm.toolkit.ops.vocabulary import Array


def finite(component: str, output: str, values: Array) -> Array:
    """The values themselves. Raises AccuracyError, naming the component, if one is no number."""
    if not np.isfinite(values).all():
        raise AccuracyError(
            f"{component} computed {output} that are NaN or infinite",
            hint="edgevlm doctor ENGINE tells whether its files are damaged; if they are not, try "
            "the reference (build --target reference), or a bundle in another --dtype",
        )
    return values


def check_outputs(component: str, outputs: dict[str, Tensor]) -> None:
    """The same for all outputs of a component that are in the host's memory."""
    for name, values in outputs.items():
        if isinstance(values, np.ndarray):
            finite(component, name, values)
