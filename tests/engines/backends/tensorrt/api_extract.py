"""Writes tests/goldens/tensorrt_api/api.json: which names of TensorRT and cuda-core our code may
use, in which releases, with the names of their parameters. Facts alone, no text of NVIDIA's.

    python -m tests.engines.backends.tensorrt.api_extract TENSORRT_API SITE_PACKAGES

TENSORRT_API: a folder with a JSON file per release, made from the bindings. SITE_PACKAGES: where
cuda-core is installed, whose .pyi files are read.
"""

from __future__ import annotations

import ast
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import HERE, ROOT

FILE = HERE / "goldens/tensorrt_api/api.json"
SOURCES = ROOT / "engines/backends/tensorrt"
RELEASES = (
    *("10.3.0", "10.7.0", "10.13.3.9", "10.16.1.11", "11.1.0.106", "11.4.0.106"),
    *("rtx-1.4.0.76", "rtx-1.5.0.114", "rtx-1.6.1.120", "rtx-1.7.1.116"),
)
CLASSES = (
    *("Builder", "INetworkDefinition", "OnnxParser", "ParserError", "IBuilderConfig"),
    *("IOptimizationProfile", "ITimingCache", "IHostMemory", "IAttentionInputLayer", "ILayer"),
    *("IAttention", "IAttentionBoundaryLayer", "Runtime", "ICudaEngine", "IExecutionContext"),
    *("IProfiler", "ILogger", "IRuntimeConfig", "IRuntimeCache"),
    *("DataType", "TensorIOMode", "ExecutionContextAllocationStrategy", "ProfilingVerbosity"),
    *("MemoryPoolType", "LayerType", "ILogger.Severity", "NetworkDefinitionCreationFlag"),
    *("ComputeCapability", "EngineInvalidityDiagnostics", "EngineValidity", "ErrorCode"),
    *("IPluginRegistry", "KernelLaunchParams", "BuilderFlag", "Refitter", "OnnxParserRefitter"),
)
FUNCTIONS = ("get_plugin_registry",)
WHOLE = (  # of which all members are kept
    *("ComputeCapability", "DataType", "ILogger.Severity", "EngineValidity", "TensorIOMode"),
)
CUDA = {
    "_device.pyi": ("Device",),
    "_stream.pyi": ("Stream",),
    "_memory/_buffer.pyi": ("Buffer",),
    "_memory/_legacy.py": ("LegacyPinnedMemoryResource",),
    "graph/_graph_builder.pyi": ("GraphBuilder", "Graph"),
}
Fact = tuple[str, str, Any]  # a name with its class, the kind of thing, and what is known of it


def used() -> set[str]:
    """Every name that our code reads from something, or has in a string."""
    found = {"__init__"}
    for path in SOURCES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def of_tensorrt(data: dict[str, Any], names: set[str]) -> Iterator[Fact]:
    """What one release has of `names` in our classes, and of its functions."""
    for name in FUNCTIONS:
        if name in data["tensorrt"]["functions"]:
            yield name, "function", []
    for owner in CLASSES:
        known = data["tensorrt"]["classes"].get(owner)
        if known is None:
            continue
        yield owner, "class", [base for base in known["bases"] if base in CLASSES]
        for name, method in known["methods"].items():
            if name in names:
                overloads = [p for p in method.get("params", []) if p is not None]
                if any(text.startswith("__str__(") for text in method["signatures"]):
                    yield f"{owner}.{name}", "property", False  # pybind11's name of an enum
                else:
                    yield f"{owner}.{name}", "method", [_parameters(p) for p in overloads]
        for name, about in known["properties"].items():
            if name in names:
                yield f"{owner}.{name}", "property", bool(about.get("writable"))
        for name, value in known["enum"].items():
            if name in names or owner in WHOLE:
                yield f"{owner}.{name}", "member", value


def _parameters(listed: list[dict[str, Any]]) -> list[str]:
    """Names without self; "=" behind those that may be left out."""
    optional = ["" if p["default"] is None else "=" for p in listed]
    pairs = zip(listed, optional, strict=True)
    return [p["name"] + end for p, end in pairs if p["name"] != "self"]


def of_cuda(folder: Path, names: set[str]) -> Iterator[Fact]:
    """The same of cuda-core."""
    for file, owners in CUDA.items():
        for node in ast.parse((folder / file).read_text()).body:
            if not (isinstance(node, ast.ClassDef) and node.name in owners):
                continue
            yield node.name, "class", []
            for member in node.body:
                if not isinstance(member, ast.FunctionDef) or member.name not in names:
                    continue
                marks = {ast.unparse(mark) for mark in member.decorator_list}
                if "property" in marks:
                    yield f"{node.name}.{member.name}", "property", False
                else:
                    yield f"{node.name}.{member.name}", "method", [_arguments(member)]


def _arguments(function: ast.FunctionDef) -> list[str]:
    """As _parameters; "*" before those that are named in a call."""
    a = function.args
    plain = [arg.arg for arg in (*a.posonlyargs, *a.args)]
    needed = len(plain) - len(a.defaults)
    found = [name + ("=" if at >= needed else "") for at, name in enumerate(plain)]
    found = [name for name in found if name not in ("self", "cls")]
    for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True):
        found.append(f"*{arg.arg}" + ("" if default is None else "="))
    return found


def main(api: Path, site: Path) -> None:
    names = used()
    facts: dict[str, list[list[Any]]] = defaultdict(list)
    releases = [*RELEASES, "cuda-core"]
    for number, release in enumerate(releases):
        if release == "cuda-core":
            found = of_cuda(site / "cuda/core/cu13", names)
        else:
            found = of_tensorrt(json.loads((api / f"{release}.json").read_text()), names)
        for name, kind, about in found:
            same = [f for f in facts[name] if f[:2] == [kind, about]]
            if same:
                same[0][2].append(number)
            else:
                facts[name].append([kind, about, [number]])
    lines = [f"{json.dumps(name)}: {json.dumps(facts[name])}" for name in sorted(facts)]
    text = ",\n ".join(lines)
    FILE.write_text(f'{{"releases": {json.dumps(releases)},\n"facts": {{\n {text}\n}}}}\n')


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
