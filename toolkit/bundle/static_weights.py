"""Weights in static INT8 and FP8 (quantization/static.py), read strictly from their file."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.errors import BundleError
from edgevlm.toolkit.ops import float8
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import static
from edgevlm.toolkit.quantization.static import Form

Steps = Mapping[str, tuple[Array, Form]]
_AGAIN = "export or calibrate it again"


def names(file: SafetensorsFile) -> frozenset[str]:
    """The tensors of a file that are parts of such weights.

    Raises BundleError for any other tensor in FP8: codes without a step are no weights.
    """
    for name, entry in file.entries.items():
        parts = static.split(name)
        if entry.dtype == "fp8" and (parts is None or parts[1:] != (static.FP8, "")):
            raise BundleError(f"{file.path}: {name} is stored in FP8 without a step", hint=_AGAIN)
    return frozenset(name for name in file.entries if static.split(name))


def input_steps(file: SafetensorsFile) -> Steps:
    """The steps of inputs in float32, and the form of the weight, by its key.

    Raises BundleError for a step that nothing could be divided by.
    """
    found = {}
    for name in file.entries:
        parts = static.split(name)
        if parts and parts[2] == static.INPUT:
            found[parts[0]] = _steps(file, name, ()), parts[1]
    return found


def weight(file: SafetensorsFile, key: str, form: Form) -> Array:
    """The floats that codes stand for, float32 in the shape of the codes. Raises BundleError for
    what cannot be codes, or steps.
    """
    stored, steps = codes(file, key, form)
    return static.dequantize(stored, steps, form)


def codes(file: SafetensorsFile, key: str, form: Form) -> tuple[Array, Array]:
    """The same as codes, int8 or uint8, and steps, float32 [channels] or one for
    all. Raises BundleError.
    """
    name = key + form.suffix
    if name not in file.entries or file.dtype(name) != form.to:
        raise BundleError(f"{file.path}: {name} is not stored as {form.to}", hint=_AGAIN)
    stored = file.read(name)
    steps = _steps(file, name + static.SCALE, static.scale_shape(stored.shape, form))
    if form.to == "fp8":
        check_codes(file, name)
    return stored, steps


def check_codes(file: SafetensorsFile, name: str) -> None:
    """Raise BundleError for a tensor of FP8 with codes that are no numbers."""
    try:
        float8.check(file.read(name))
    except ValueError as odd:
        raise BundleError(f"{file.path}: {name}: {odd}", hint=_AGAIN) from None


def check(file: SafetensorsFile) -> None:
    """Raise BundleError for codes and steps of FP8 in a file that no engine could be built of."""
    for name, entry in file.entries.items():
        parts = static.split(name)
        if entry.dtype == "fp8":
            check_codes(file, name)
        elif parts and parts[1].to == "fp8" and parts[2]:
            _steps(file, name, ())


def _steps(file: SafetensorsFile, name: str, shape: tuple[int, ...]) -> Array:
    if name not in file.entries:
        raise BundleError(f"{file.path} lacks {name}", hint=_AGAIN)
    found = file.read(name)
    right = found.dtype.kind == "f" and found.shape == shape
    if not right or not (np.isfinite(found).all() and (found > 0).all()):
        raise BundleError(
            f"{file.path}: {name} {found.shape} has steps that are no numbers above 0, or not "
            f"of the shape {shape}",
            hint=_AGAIN,
        )
    return found.astype(np.float32)
