"""The graphics card of this machine, asked of the driver; nothing here needs one to be there."""

from __future__ import annotations

import ctypes
import ctypes.util

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: compute capability


def architecture(number: int = 0) -> str | None:
    """Compute capability of a card as "sm_89"; None without a driver or card."""
    driver = _driver()
    if driver is None or driver.cuInit(0) != 0:
        return None
    handle = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(handle), number) != 0:
        return None
    parts = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle) != 0:
            return None
        parts.append(value.value)
    return f"sm_{parts[0]}{parts[1]}"


def _driver() -> ctypes.CDLL | None:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
