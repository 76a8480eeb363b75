"""What the figures of a profile depend on besides the engine: device, clocks, load, versions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from edgevlm.toolkit.terminal.device import device_context

_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tokenizers", "pillow")
_CORE = "sys/devices/system/cpu/cpu0/cpufreq"


def processor_context(root: Path = Path("/")) -> dict[str, Any]:
    """Of this machine now; None for what the system does not say. root: of the file system.

    clock_mhz: of the first processor; load_average: of the last minute, with this process in it.
    Call it before anything is measured, as that is a load too.
    """
    return {
        "processors": os.cpu_count(),
        "clock_mhz": _clock_mhz(root),
        "clock_max_mhz": _mhz(root / _CORE / "scaling_max_freq"),
        "governor": _text(root / _CORE / "scaling_governor"),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_gb": _memory_gb(root),
        "versions": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def device_part(found: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The graphics card, or the Jetson, with its power mode and clocks, as "device"; {} elsewhere.

    Call it behind the last run, as clocks fall within seconds. found: what device_context gives.
    """
    told = device_context() if found is None else found
    return {"device": dict(told)} if told["card"] or told["jetson"] else {}


def warnings(context: Mapping[str, Any]) -> list[str]:
    """Why figures of such a context are not the engine's alone."""
    load, processors = context.get("load_average"), context.get("processors")
    if not load or not processors or load <= processors:
        return []
    return [
        f"the machine was loaded when this began: {load:.1f} runnable programs on {processors} "
        "processors; times and limits are those of a loaded machine"
    ]


def _clock_mhz(root: Path) -> float | None:
    now = _mhz(root / _CORE / "scaling_cur_freq")
    if now is not None:
        return now
    lines = (_text(root / "proc/cpuinfo") or "").splitlines()
    with suppress(StopIteration, ValueError):
        return round(float(next(s for s in lines if s.startswith("cpu MHz")).split(":")[1]), 1)
    return None


def _memory_gb(root: Path) -> float | None:
    lines = (_text(root / "proc/meminfo") or "").splitlines()
    with suppress(StopIteration, ValueError):
        kilobytes = int(next(s for s in lines if s.startswith("MemTotal")).split()[1])
        return round(kilobytes * 1024 / 1e9, 1)
    return None


def _mhz(file: Path) -> float | None:
    text = _text(file)
    return round(int(text) / 1000, 1) if text and text.isdigit() else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
