"""The NVIDIA card of this machine, asked of its driver; nothing here needs one to be there."""

from __future__ import annotations

import ctypes

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: compute capability
_INTEGRATED = 18  # the same: whether it shares the processor's memory
_NAME_BYTES = 96
_FP8_SINCE = 89
NO_DEVICE = "no-device"  # stands for the architecture where there is no card


def architecture(number: int = 0) -> str | None:
    """Compute capability of a card as "sm_89"; None without a driver or card."""
    card = _card(number)
    if card is None:
        return None
    driver, handle = card
    parts = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle) != 0:
            return None
        parts.append(value.value)
    return f"sm_{parts[0]}{parts[1]}"


def capability(arch: str) -> int:
    """Compute capability of an architecture as a number: 89 of sm_89; 0 of what is no card's."""
    number = arch.removeprefix("sm_")
    return int(number) if number.isdigit() else 0


def has_fp8(arch: str) -> bool:
    """Whether a card multiplies FP8 (E4M3): Ada, Hopper, Blackwell and newer. arch: as sm_89.

    Of several (sm_80+sm_89), whether all do. NVIDIA, CUDA C++ programming guide, compute
    capabilities.
    """
    return all(capability(part) >= _FP8_SINCE for part in arch.split("+"))


def name(number: int = 0) -> str | None:
    """What a card calls itself; None without a driver or card."""
    card = _card(number)
    if card is None:
        return None
    driver, handle = card
    text = ctypes.create_string_buffer(_NAME_BYTES)
    found = driver.cuDeviceGetName(text, _NAME_BYTES, handle)
    return text.value.decode(errors="replace") if found == 0 else None


def driver_version() -> str | None:
    """The newest CUDA that the driver runs, "13.0"; None without a driver."""
    driver, value = _library("libcuda.so.1", "nvcuda.dll"), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(value)) != 0:
        return None
    return f"{value.value // 1000}.{value.value % 1000 // 10}"


def memory_bytes(number: int = 0) -> int | None:
    """Memory of a card in all; None without a driver or card."""
    card, found = _card(number), ctypes.c_size_t()
    if card is None or card[0].cuDeviceTotalMem_v2(ctypes.byref(found), card[1]) != 0:
        return None
    return found.value


def shares_memory(number: int = 0) -> bool | None:
    """Whether a card uses the processor's memory, as on Jetson; None without a driver or card."""
    card, found = _card(number), ctypes.c_int()
    if card is None or card[0].cuDeviceGetAttribute(ctypes.byref(found), _INTEGRATED, card[1]):
        return None
    return bool(found.value)


class _Memory(ctypes.Structure):
    _fields_ = [(field, ctypes.c_ulonglong) for field in ("total", "free", "used")]


def free_bytes(number: int = 0) -> int | None:
    """Memory of a card that nobody holds; None where its management library cannot say."""
    library, handle = _library("libnvidia-ml.so.1", "nvml.dll"), ctypes.c_void_p()
    if library is None or library.nvmlInit_v2() != 0:
        return None
    try:
        if library.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle)) != 0:
            return None
        memory = _Memory()
        failed = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        return None if failed else int(memory.free)
    finally:
        library.nvmlShutdown()


def _card(number: int) -> tuple[ctypes.CDLL, ctypes.c_int] | None:
    driver = _library("libcuda.so.1", "nvcuda.dll")
    if driver is None or driver.cuInit(0) != 0:
        return None
    handle = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(handle), number) != 0:
        return None
    return driver, handle


def _library(*names: str) -> ctypes.CDLL | None:
    for known in names:
        try:
            return ctypes.CDLL(known)
        except OSError:
            continue
    return None
