"""What every plugin says to TensorRT 10.13 and newer: number formats, PTX, grid, scalars.

Such a plugin is Python while an engine is built; the engine holds its PTX and needs nothing else.
A plugin's kernel takes input pointers, int32 numbers that TensorRT computes from shapes, and
output pointers, in this order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.engines.plugins.compile import Launch, compiled
from edgevlm.toolkit.errors import UnsupportedError, needing

# The parser hands every attribute as an array of one. NVIDIA's code would make an int of it by
# int(array), which NumPy refuses since 2.4; arrays it leaves as they are.
Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
NAMESPACE = "edgevlm"
FORMATS = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}
_TENSORRT_NAMES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}


def define(folders: Iterable[str], sm: int) -> None:
    """Register plugins by their folders' names, for cards of compute capability `sm`.

    Only where TensorRT itself builds: TensorRT-RTX ends a process whose parser takes a plugin.
    Raises UnsupportedError there and before 10.13, MissingExtra without TensorRT.
    """
    with needing("tensorrt", "tensorrt", purpose="building with plugins"):
        trt = import_module("tensorrt")
    if not hasattr(trt, "KernelLaunchParams"):
        raise UnsupportedError(
            f"{trt.__name__} {trt.__version__} takes no plugins that are compiled ahead of time",
            hint="TensorRT 10.13 does; 10.3 takes those that make in engines/plugins/cpp builds",
        )
    for folder in folders:
        import_module(f"edgevlm.engines.plugins.{folder}.plugin").define(sm)


def combinations(trtp: Any, names: Sequence[str], float32: Sequence[str] = ()) -> list[Any]:
    """The formats that a plugin takes: all tensors in one, but `float32` always in that."""
    rows = [
        ", ".join("FP32" if name in float32 else form for name in names)
        for form in FORMATS.values()
    ]
    return [trtp.AutoTuneCombination(row, ", ".join(["LINEAR"] * len(names))) for row in rows]


def number(attribute: Ints) -> int:
    """An attribute's value."""
    return int(attribute[0])


def dtype_of(tensor: Any) -> str:
    """The number format of a tensor's description, by our name."""
    return _TENSORRT_NAMES[tensor.dtype.name]


def answer(
    trtp: Any,
    kernel: Any,
    launch: Launch,
    dtype: str,
    sm: int,
    programs: Any,
    scalars: Sequence[Any],
) -> tuple[str, str, Any, Any]:
    """What a plugin hands TensorRT: the kernel's name, its PTX, how to launch it, its scalars.

    programs, scalars: expressions of shapes.
    """
    made = compiled(kernel, launch, dtype, sm)
    how = trtp.KernelLaunchParams()
    how.grid_x, how.block_x, how.shared_mem = programs, made.threads, made.shared_bytes
    extra = trtp.SymIntExprs(len(scalars))
    for index, scalar in enumerate(scalars):
        extra[index] = trtp.SymInt32(scalar)
    return made.name, made.ptx, how, extra
