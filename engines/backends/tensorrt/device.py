"""The graphics card of this machine, asked of the driver; nothing here needs one to be there."""

from __future__ import annotations

import ctypes
import ctypes.util
from dataclasses import dataclass

_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute: compute capability; shares memory


@dataclass(frozen=True)
class CardFacts:
    """name: as its vendor calls it. cuda: the newest CUDA that the driver knows, "13.0".

    memory_bytes: in all; shared: with the processor, as on Jetson.
    """

    name: str
    cuda: str
    memory_bytes: int
    shared: bool

    @property
    def workspace_bytes(self) -> int:
        """What a builder may take to try kernels out, beside the weights, which it holds twice."""
        return self.memory_bytes // (4 if self.shared else 2)


def architecture(number: int = 0) -> str | None:
    """Compute capability of a card as "sm_89"; None without a driver or card."""
    opened = _card(number)
    if opened is None:
        return None
    parts = [_attribute(*opened, which) for which in (_MAJOR, _MINOR)]
    return None if None in parts else f"sm_{parts[0]}{parts[1]}"


def facts(number: int = 0) -> CardFacts | None:
    """What a builder goes by; None without a driver or card."""
    opened = _card(number)
    if opened is None:
        return None
    driver, handle = opened
    name, memory, cuda = ctypes.create_string_buffer(256), ctypes.c_size_t(), ctypes.c_int()
    asked = (
        driver.cuDeviceGetName(name, len(name), handle),
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle),
        driver.cuDriverGetVersion(ctypes.byref(cuda)),
    )
    if any(asked):
        return None
    release = f"{cuda.value // 1000}.{cuda.value % 1000 // 10}"
    shared = bool(_attribute(driver, handle, _INTEGRATED))
    return CardFacts(name.value.decode(errors="replace"), release, memory.value, shared)


def _card(number: int) -> tuple[ctypes.CDLL, ctypes.c_int] | None:
    driver = _driver()
    if driver is None or driver.cuInit(0) != 0:
        return None
    handle = ctypes.c_int()
    return (driver, handle) if driver.cuDeviceGet(ctypes.byref(handle), number) == 0 else None


def _attribute(driver: ctypes.CDLL, handle: ctypes.c_int, which: int) -> int | None:
    value = ctypes.c_int()
    if driver.cuDeviceGetAttribute(ctypes.byref(value), which, handle) != 0:
        return None
    return value.value


def _driver() -> ctypes.CDLL | None:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
