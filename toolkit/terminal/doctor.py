"""The doctor: versions, devices, backends, and for what is missing the command that installs it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from edgevlm.toolkit.target import (
    instruction_sets,
    machine,
    processor_name,
    saturates_int8,
    this_cpu,
    threads_here,
)
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
}


def report(version: str) -> tuple[dict[str, Any], list[str]]:
    """The data and the lines of `edgevlm doctor`."""
    packages = {name: _version(name) for name in _PACKAGES}
    data: dict[str, Any] = {
        "edgevlm": version,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor_name(),
        "instruction_sets": instruction_sets(),
        "int8_products": _int8_products(),
        "processor_threads": threads_here(),
        "memory_gb": round(_memory_gb(), 1),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "nvidia_driver": Path("/proc/driver/nvidia/version").exists(),
        "packages": packages,
        "targets": _targets(packages),
        "problems": _problems(packages),
    }
    return data, _lines(data)


def _int8_products() -> str:
    """How engines built here multiply 8-bit numbers."""
    if machine() == "x86_64":
        return "unsigned weights" if saturates_int8() else "signed weights (VNNI)"
    return "unsigned weights; never measured on this architecture"


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
    return targets


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
    if not packages["onnx"]:
        problems.append(
            {
                "problem": "onnx is missing: no export, no build",
                "fix": "pip install 'edgevlm[export]'",
            }
        )
    return problems


def _lines(data: dict[str, Any]) -> list[str]:
    lines = [
        f"edgevlm {data['edgevlm']}, Python {data['python']}, {data['system']}",
        f"{data['processor']}: {' '.join(data['instruction_sets']) or 'instruction sets unknown'}",
        f"8-bit products: {data['int8_products']}",
        f"an engine uses {data['processor_threads']} threads, unless --threads says otherwise; its "
        "components share them, each with an arena of its own",
        f"{data['memory_gb']} GB memory, "
        f"{data['disk_free_gb']} GB disk free, "
        f"{'an' if data['nvidia_driver'] else 'no'} NVIDIA driver",
        f"targets here: {', '.join(data['targets'])}",
        "",
    ]
    rows = [
        (name, version or "-", f"edgevlm[{_PACKAGES[name]}]" if _PACKAGES[name] else "base")
        for name, version in data["packages"].items()
    ]
    lines += table(("package", "version", "comes with"), rows)
    for item in data["problems"]:
        lines += ["", f"problem: {item['problem']}", f"fix:     {item['fix']}"]
    return lines
