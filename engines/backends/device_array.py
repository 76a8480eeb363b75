"""Arrays in the memory of a device, as ONNX Runtime holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgevlm.toolkit.target import load_onnxruntime

# TensorProto's numbers, which need no onnx, with NumPy types of the same size.
ELEMENTS: dict[str, tuple[int, type[np.generic]]] = {
    "fp32": (1, np.float32),
    "fp16": (10, np.float16),
    "bf16": (16, np.uint16),
    "int64": (7, np.int64),
}


@dataclass(frozen=True)
class Device:
    """A kind of device in ONNX Runtime's words, "cuda" or "cpu", and which of them."""

    kind: str
    number: int = 0


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """Rows of an array on a device, as far as slots of a KV cache need it: slices of the first
    axis share memory with what they were taken from.

    value: ONNX Runtime's owner of the memory. dtype: a key of ELEMENTS. offset: in elements.
    """

    value: Any
    shape: tuple[int, ...]
    dtype: str
    device: Device
    offset: int = 0

    @property
    def address(self) -> int:
        """Of the first element."""
        size = np.dtype(ELEMENTS[self.dtype][1]).itemsize
        return int(self.value.data_ptr()) + size * self.offset

    def __getitem__(self, rows: slice) -> DeviceArray:
        begin, end, _ = rows.indices(self.shape[0])
        each = math.prod(self.shape[1:])
        shape = (end - begin, *self.shape[1:])
        return DeviceArray(self.value, shape, self.dtype, self.device, self.offset + begin * each)

    def bound(self) -> tuple[Any, ...]:
        """What binding it to a session takes, behind the name."""
        where = (self.device.kind, self.device.number)
        return (*where, ELEMENTS[self.dtype][0], list(self.shape), self.address)


def empty(shape: Sequence[int], dtype: str, device: Device) -> DeviceArray:
    """Memory for an array. Raises what ONNX Runtime raises where there is none.

    An array without elements gets memory too: a null pointer cannot be told from a missing one.
    """
    held = list(shape) if all(shape) else [1]
    value = load_onnxruntime().OrtValue.ortvalue_from_shape_and_type(
        held, ELEMENTS[dtype][0], device.kind, device.number
    )
    return DeviceArray(value, tuple(shape), dtype, device)


def zeros(shape: Sequence[int], dtype: str, device: Device) -> DeviceArray:
    """The same, filled with zeros: rows that nobody has written must not hold NaN."""
    array = empty(shape, dtype, device)
    element, same_size = ELEMENTS[dtype]
    blank = np.zeros(tuple(shape), same_size)
    if dtype == "bf16":  # which NumPy does not have
        blank = load_onnxruntime().OrtValue.ortvalue_from_numpy_with_onnx_type(blank, element)
    array.value.update_inplace(blank)
    return array
