"""What a measurement depends on beside the program: the device, its software, power mode, clocks.

Tools that tell are asked where they are; whatever is absent is None. Nothing here needs a card, the
rights of root, or a package of NVIDIA's.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from edgevlm.toolkit.target import card, machine

Said = Callable[[Sequence[str]], "str | None"]  # what a command prints; None where it cannot run
_PACKAGES = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
    "cuda_core": ("cuda-core",),
}
# On Jetson TensorRT is a package of the system, which Python may not know.
_LIBRARIES = ("libnvinfer11", "libnvinfer10", "libnvinfer8")
_QUERIED = (
    *("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem"),
    *("power.limit", "pstate"),
)
_SECONDS = 5.0  # a tool that takes longer hangs
_KHZ, _HZ = 1e3, 1e6  # in one MHz
_SHOWN = {"GPU": ("gpu", _HZ), "EMC": ("memory", _HZ), "cpu": ("cpu", _KHZ)}  # by jetson_clocks


def device_context(said: Said | None = None, root: Path = Path("/")) -> dict[str, Any]:
    """What a report of this machine's speed has to state, ready for JSON; None for what is absent.

    Clocks are in MHz, now and within which limits, from the best source there is: jetson_clocks
    (as root), nvidia-smi, or files of the kernel. said: runs a command; root: of the file system.
    """
    ask = said or _said
    smi = nvidia_smi(ask(("nvidia-smi", *_smi_options())) or "")
    mode = power_mode(ask(("nvpmodel", "-q")) or "")
    return {
        "machine": machine(),
        "jetson": _jetson(ask, root),
        "driver": smi.get("driver") or driver(_text(root / "proc/driver/nvidia/version")),
        "cuda": card.driver_version(),
        "card": _card(),
        **{name: _version(packages) for name, packages in _PACKAGES.items()},
        "tensorrt_library": _first(ask, _LIBRARIES),
        "power_mode": mode,
        "power_limit_w": smi.get("power_limit_w"),
        "clocks": _clocks(ask, root, smi),
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str | None]]:
    """The same for people: what each fact is called, and the fact, None if absent."""
    jetson, own = found["jetson"] or {}, found["card"] or {}
    memory = own.get("memory_gb")
    known = {
        "Jetson": jetson.get("model"),
        "L4T": jetson.get("l4t"),
        "JetPack": jetson.get("jetpack"),
        "NVIDIA driver": found["driver"],
        "CUDA of the driver": found["cuda"],
        "graphics card": own.get("name"),
        "compute capability": own.get("architecture"),
        "memory of the card": None if memory is None else _memory(own),
        "TensorRT": found["tensorrt"] or found["tensorrt_library"],
        "TensorRT-RTX": found["tensorrt_rtx"],
        "cuda-core": found["cuda_core"],
        "power mode": _mode(found),
        "clocks": _clock_text(found["clocks"]),
    }
    return list(known.items())


# -- what tools print -------------------------------------------------------------------------


def l4t(text: str) -> str | None:
    """The release of Jetson Linux, "36.4.3", from /etc/nv_tegra_release."""
    found = re.search(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None


def power_mode(text: str) -> dict[str, Any] | None:
    """Name and number of a Jetson's power mode, from `nvpmodel -q`; the number may be missing."""
    found = re.search(r"NV Power Mode:\s*(\S+)[^\n]*(?:\n\s*(\d+)\s*$)?", text, re.M)
    if found is None:
        return None
    return {"name": found[1], "number": int(found[2]) if found[2] else None}


def jetson_clocks(text: str) -> dict[str, Any] | None:
    """Clocks from `jetson_clocks --show`: those of the GPU, the memory and the fastest core."""
    parts = re.findall(
        r"^\s*(GPU|EMC|cpu)\S*\s.*?MinFreq=(\d+)\s+MaxFreq=(\d+)\s+CurrentFreq=(\d+)", text, re.M
    )
    found: dict[str, Any] = {}
    for name, *frequencies in parts:
        key, unit = _SHOWN[name]
        least, most, now = (int(frequency) / unit for frequency in frequencies)
        if key not in found or most > found[key]["max_mhz"]:
            found[key] = _span(now, least, most)
    if not found:
        return None
    governor = re.search(r"Governor=(\S+)", text)
    return {"source": "jetson_clocks", **found, "governor": governor[1] if governor else None}


def nvidia_smi(text: str) -> dict[str, Any]:
    """What nvidia-smi says of the first card; values that it does not know are left out."""
    line = next((line for line in text.splitlines() if line.count(",") >= len(_QUERIED) - 1), "")
    values = dict(zip(_QUERIED, (part.strip() for part in line.split(",")), strict=False))
    known = {name: value for name, value in values.items() if value and "[" not in value}
    found: dict[str, Any] = {}
    if "driver_version" in known:
        found["driver"] = known["driver_version"]
    if "power.limit" in known:
        found["power_limit_w"] = _number(known["power.limit"])
    for name, key in (("gpu", "sm"), ("memory", "mem")):
        now, most = (_number(known.get(f"clocks.{part}{key}", "")) for part in ("", "max."))
        if now is not None and most is not None:
            found[name] = _span(now, None, most)
    if "pstate" in known:
        found["state"] = known["pstate"]
    return found


def driver(text: str) -> str | None:
    """The driver's release, from /proc/driver/nvidia/version."""
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\S+)", text)
    return found[1] if found else None


# -- where it is found ------------------------------------------------------------------------


def _said(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None


def _smi_options() -> tuple[str, str]:
    return f"--query-gpu={','.join(_QUERIED)}", "--format=csv,noheader,nounits"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _jetson(ask: Said, root: Path) -> dict[str, Any] | None:
    """Model, release of Jetson Linux and of JetPack; None on any other machine."""
    model = _text(root / "proc/device-tree/model")
    release = l4t(_text(root / "etc/nv_tegra_release"))
    if release is None and "Jetson" not in model:
        return None
    return {"model": model or None, "l4t": release, "jetpack": _installed(ask, "nvidia-jetpack")}


def _installed(ask: Said, package: str) -> str | None:
    """The version of a package of the system."""
    found = ask(("dpkg-query", "--show", "--showformat=${Version}", package))
    return found.strip() or None if found else None


def _first(ask: Said, packages: Sequence[str]) -> str | None:
    return next((v for v in (_installed(ask, name) for name in packages) if v), None)


def _version(packages: Sequence[str]) -> str | None:
    for name in packages:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _card() -> dict[str, Any] | None:
    architecture = card.architecture()
    if architecture is None:
        return None
    whole, free = card.memory_bytes(), card.free_bytes()
    return {
        "name": card.name(),
        "architecture": architecture,
        "memory_gb": None if whole is None else round(whole / 1e9, 1),
        "free_gb": None if free is None else round(free / 1e9, 1),
        "shared": card.shares_memory(),
    }


def _clocks(ask: Said, root: Path, smi: dict[str, Any]) -> dict[str, Any] | None:
    shown = jetson_clocks(ask(("jetson_clocks", "--show")) or "")
    if shown is not None:
        return shown
    own: dict[str, Any] = {n: smi[n] for n in ("gpu", "memory", "state") if n in smi}
    if "gpu" in own:
        return {"source": "nvidia-smi", **own}
    return _of_kernel(root / "sys")


def _of_kernel(sys: Path) -> dict[str, Any] | None:
    """Clocks of a Jetson's GPU, which everybody may read, and those of the first core."""
    found: dict[str, Any] = {}
    for folder in sorted(sys.glob("class/devfreq/*gpu*"))[:1]:
        found["gpu"] = _read(folder, ("cur_freq", "min_freq", "max_freq"), _HZ)
    core = sys / "devices/system/cpu/cpu0/cpufreq"
    names = ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq")
    found["cpu"] = _read(core, names, _KHZ)
    known = {name: span for name, span in found.items() if span is not None}
    if not known:
        return None
    return {"source": "sysfs", **known, "governor": _text(core / "scaling_governor") or None}


def _read(folder: Path, names: tuple[str, str, str], unit: float) -> dict[str, Any] | None:
    values = [_number(_text(folder / name)) for name in names]
    if values[0] is None:
        return None
    return _span(*(None if value is None else value / unit for value in values))


def _span(now: float | None, least: float | None, most: float | None) -> dict[str, Any]:
    return {"now_mhz": now, "min_mhz": least, "max_mhz": most}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# -- as text ----------------------------------------------------------------------------------


def _memory(own: dict[str, Any]) -> str:
    free = "" if own["free_gb"] is None else f", {own['free_gb']} GB free"
    shared = ", shared with the processor" if own["shared"] else ""
    return f"{own['memory_gb']} GB{free}{shared}"


def _mode(found: dict[str, Any]) -> str | None:
    mode, limit = found["power_mode"], found["power_limit_w"]
    if mode is not None:
        return str(mode["name"])
    return None if limit is None else f"limit {limit:g} W"


def _clock_text(clocks: dict[str, Any] | None) -> str | None:
    if clocks is None:
        return None
    parts = [
        f"{name} {clocks[name]['now_mhz']:.0f} of {clocks[name]['max_mhz']:.0f} MHz"
        for name in ("gpu", "memory", "cpu")
        if clocks.get(name) and clocks[name]["max_mhz"] is not None
    ]
    return f"{', '.join(parts)} ({clocks['source']})" if parts else None
