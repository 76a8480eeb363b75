"""torch as an interpreter that only runs forward, on the processor: what calibration uses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array


def interpreter() -> tuple[Any, Callable[[Array], Any], Callable[[Any], Array]] | None:
    """Ops, from an array to their tensors, and back; None where torch is not installed."""
    if find_spec("torch") is None:
        return None
    from edgevlm.training.forward_ops import ForwardOps

    return ForwardOps(), _load, _read


def _load(array: Array) -> Any:
    """An array as a tensor, half precision as float32; memory is shared where it can be."""
    import torch

    if array.dtype == np.float16:
        array = array.astype(np.float32)
    with warnings.catch_warnings():  # weights are mapped from a file, and nobody writes to them
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(np.require(array, requirements=["C", "A"]))


def _read(tensor: Any) -> Array:
    """The array of a tensor, sharing its memory."""
    array: Array = tensor.numpy()
    return array
