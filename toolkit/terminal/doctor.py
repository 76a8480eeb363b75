"""The doctor: versions, devices, backends, and for what is missing the command that installs it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from textwrap import wrap
from typing import Any

from edgevlm.toolkit.errors import MissingExtra
from edgevlm.toolkit.target import (
    CUDA_CARDS,
    card,
    instruction_sets,
    load_onnxruntime,
    machine,
    processor_name,
    saturates_int8,
    this_card,
    this_cpu,
    threads_here,
)
from edgevlm.toolkit.terminal import device
from edgevlm.toolkit.terminal.console import table

_PACKAGES = {
    "numpy": "",
    "tokenizers": "",
    "pillow": "",
    "safetensors": "",
    "typer": "",
    "rich": "",
    "jinja2": "",
    "onnxruntime": "cpu",
    "onnxruntime-gpu": "gpu",
    "tensorrt": "tensorrt",
    "onnx": "export",
    "sentencepiece": "export",
    "huggingface-hub": "export",
    "torch": "train",
    "accelerate": "train",
    "fastapi": "serve",
    "prompt-toolkit": "chat",
}


def report(version: str, kernels: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """The data and the lines of `edgevlm doctor`. kernels: what engines/native says of itself."""
    packages = {name: _version(name) for name in _PACKAGES}
    data: dict[str, Any] = {
        "edgevlm": version,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor_name(),
        "instruction_sets": instruction_sets(),
        "int8_products": _int8_products(),
        "native_kernels": kernels,
        "processor_threads": threads_here(),
        "memory_gb": round(_memory_gb(), 1),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "nvidia_driver": Path("/proc/driver/nvidia/version").exists(),
        "card": _card(),
        "device": device.device_context(),
        "onnxruntime_providers": _providers(packages),
        "packages": packages,
        "targets": _targets(packages),
        "problems": _problems(packages),
    }
    return data, _lines(data)


def _card() -> dict[str, Any] | None:
    """The NVIDIA card, by its driver; None where there is none."""
    architecture = card.architecture()
    if architecture is None:
        return None
    free = card.free_bytes()
    return {
        "name": card.name(),
        "architecture": architecture,
        "cuda_of_the_driver": card.driver_version(),
        "free_gb": None if free is None else round(free / 1e9, 1),
    }


def _providers(packages: dict[str, str | None]) -> list[str]:
    """What onnxruntime-gpu can execute graphs with; [] where it is not installed."""
    if not packages["onnxruntime-gpu"]:
        return []
    try:
        return list(load_onnxruntime().get_available_providers())
    except MissingExtra:
        return []


def _int8_products() -> str:
    """How engines built here multiply 8-bit numbers."""
    if machine() == "x86_64":
        return "unsigned weights" if saturates_int8() else "signed weights (VNNI)"
    dots = {"i8mm": "UMMLA", "asimddp": "UDOT"}
    own = [name for flag, name in dots.items() if flag in instruction_sets()]
    how = f" ({own[0]})" if own else ""
    return f"unsigned weights{how}; never measured on this architecture"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory_gb() -> float:
    if not hasattr(os, "sysconf"):
        return 0.0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _targets(packages: dict[str, str | None]) -> list[str]:
    """Targets that can be built and run here."""
    targets = ["reference"]
    if packages["onnxruntime"] or packages["onnxruntime-gpu"]:
        targets.insert(0, str(this_cpu()))
    if packages["onnxruntime-gpu"] and not _no_kernels():
        targets.insert(0, str(this_card()))
    return targets


def _no_kernels() -> str:
    """Why onnxruntime-gpu has no use for this machine's card; "" where it has."""
    architecture = card.architecture()
    if architecture is None:
        return "there is no NVIDIA card, or no driver"
    known = CUDA_CARDS.get(machine(), ())
    if architecture not in known:
        return f"onnxruntime-gpu has kernels for {', '.join(known)}, this card is {architecture}"
    return ""


def _problems(packages: dict[str, str | None]) -> list[dict[str, str]]:
    problems = []
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        problems.append(
            {
                "problem": "onnxruntime and onnxruntime-gpu overwrite each other",
                "fix": "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'edgevlm[gpu]'",
            }
        )
    if not packages["onnxruntime"] and not packages["onnxruntime-gpu"]:
        problems.append(
            {"problem": "no backend: engines cannot run", "fix": "pip install 'edgevlm[cpu]'"}
        )
    alone = packages["onnxruntime-gpu"] and not packages["onnxruntime"]
    if alone and _no_kernels():
        problems.append(
            {
                "problem": f"the target cuda is not for this machine: {_no_kernels()}",
                "fix": "pip uninstall -y onnxruntime-gpu && pip install 'edgevlm[cpu]'; "
                "Jetsons: build with TensorRT (docs/tensorrt.md)",
            }
        )
    if not packages["onnx"]:
        problems.append(
            {
                "problem": "onnx is missing: no export, no build",
                "fix": "pip install 'edgevlm[export]'",
            }
        )
    return problems


def _device_lines(found: dict[str, Any]) -> list[str]:
    facts = device.rows(found)
    known = [(name, value) for name, value in facts if value]
    lines = table(("of cards and Jetsons", "here"), known) if known else []
    absent = [name for name, value in facts if not value]
    return lines + wrap(f"not here: {', '.join(absent)}", 98) if absent else lines


def _card_lines(data: dict[str, Any]) -> list[str]:
    found, providers = data["card"], data["onnxruntime_providers"]
    lines = []
    if found:
        free = "" if found["free_gb"] is None else f", {found['free_gb']} GB free"
        lines.append(
            f"{found['name']} ({found['architecture']}{free}), its driver runs CUDA "
            f"{found['cuda_of_the_driver']}"
        )
    if providers:
        lines.append(f"onnxruntime-gpu: {', '.join(providers)}")
    return lines


def _lines(data: dict[str, Any]) -> list[str]:
    lines = [
        f"edgevlm {data['edgevlm']}, Python {data['python']}, {data['system']}",
        f"{data['processor']}: {' '.join(data['instruction_sets']) or 'instruction sets unknown'}",
        f"8-bit products: {data['int8_products']}",
        *([f"kernels of our own: {kernels}"] if (kernels := data["native_kernels"]) else []),
        f"an engine uses {data['processor_threads']} threads, unless --threads says otherwise; its "
        "components share them, each with an arena of its own",
        f"{data['memory_gb']} GB memory, "
        f"{data['disk_free_gb']} GB disk free, "
        f"{'an' if data['nvidia_driver'] else 'no'} NVIDIA driver",
        *_card_lines(data),
        f"targets here: {', '.join(data['targets'])}",
        "",
    ]
    rows = [
        (name, version or "-", f"edgevlm[{_PACKAGES[name]}]" if _PACKAGES[name] else "base")
        for name, version in data["packages"].items()
    ]
    lines += table(("package", "version", "comes with"), rows)
    lines += ["", *_device_lines(data["device"])]
    for item in data["problems"]:
        lines += ["", f"problem: {item['problem']}", f"fix:     {item['fix']}"]
    return lines
