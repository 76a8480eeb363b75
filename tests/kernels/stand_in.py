"""NVIDIA's own Python of TensorRT plugins, run without TensorRT's libraries.

    python -m tests.kernels.stand_in FOLDER

FOLDER has an unpacked wheel of TensorRT's bindings. They need a few C functions of the libraries,
which are made here to return nothing; what stands in for C++ behind them is a registry that keeps
what it gets, and expressions of shapes that are numbers. Prints what each plugin hands TensorRT.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Symbols that come from Python, the C library and the compiler's own, not from TensorRT.
_FOREIGN = re.compile(r"@|^_?Py|^_ITM|^_Z|^__|^pthread|^dl(open|sym|close|error)$")
SHAPES: Mapping[str, tuple[Sequence[tuple[int, ...]], Mapping[str, Any], Sequence[int]]] = {
    "MSDeformAttn": (
        [(2, 48, 24), (2, 35, 72), (2, 35, 36), (35, 2)],
        {"num_heads": 3, "num_points": 3, "head_dim": 8, "levels": 4, "height": 3, "width": 4},
        (3,),
    ),
    "LayerMerge": (
        [(2, 65, 120), (3, 40), (3, 40), (3,), (120, 200), (3, 200)],
        {"levels": 3, "hidden_size": 40, "epsilon": 1e-5, "output_size": 200},
        (),
    ),
    "RotateHeads": (
        [(2, 37, 48), (2, 37, 48), (37, 4)],
        {"num_heads": 6, "head_dim": 8},
        (2,),
    ),
}


def stub_libraries(extension: Path, folder: Path) -> list[Path]:
    """Libraries with the functions that the bindings want, each returning nothing."""

    def said(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    needed = re.findall(r"NEEDED.*\[(libnv[^\]]+)\]", said("readelf", "-d", str(extension)))
    symbols = said("nm", "-D", "--undefined-only", str(extension)).splitlines()
    names = sorted({line.split()[-1] for line in symbols})
    source = folder / "stub.c"
    wanted = [name for name in names if not _FOREIGN.search(name)]
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in wanted))
    for library in needed:
        target = str(folder / library)
        said("gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", target, str(source))
    return [folder / library for library in needed]


def load(folder: Path) -> tuple[Any, Any]:
    """The modules tensorrt and tensorrt.plugin, out of the unpacked bindings."""
    package = folder / "tensorrt_bindings"
    for library in stub_libraries(package / "tensorrt.so", folder):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    trt = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = trt
    registry = Registry()
    for module in (trt, sys.modules["tensorrt_bindings.tensorrt"]):
        module.get_plugin_registry = lambda: registry  # type: ignore[attr-defined]
    plugin = importlib.import_module("tensorrt_bindings.plugin")
    sys.modules["tensorrt.plugin"] = plugin
    return trt, plugin


class Registry:
    """Keeps creators by name, version and namespace."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str = "") -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str = "") -> Any:
        return self.creators.get((name, version, namespace))


def expressions(trt: Any) -> Any:
    """What makes expressions of shapes: here numbers in objects of NVIDIA's class."""

    class Number(trt.IDimensionExpr):  # type: ignore[misc]
        value: int

        def is_constant(self) -> bool:
            return True

        def get_constant_value(self) -> int:
            return self.value

        def is_size_tensor(self) -> bool:
            return False

    kinds = trt.DimensionOperation
    operations = {
        kinds.SUM: lambda a, b: a + b,
        kinds.SUB: lambda a, b: a - b,
        kinds.PROD: lambda a, b: a * b,
        kinds.FLOOR_DIV: lambda a, b: a // b,
        kinds.CEIL_DIV: lambda a, b: -(-a // b),
    }

    class Builder:
        def constant(self, value: int) -> Any:
            made = Number.__new__(Number)  # its C++ part is never asked
            made.value = int(value)
            return made

        def operation(self, kind: Any, a: Any, b: Any) -> Any:
            return self.constant(operations[kind](a.value, b.value))

    return Builder()


def given(trt: Any, name: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What NVIDIA's creator makes of attributes, which the parser hands as arrays of one."""
    creator = trt.get_plugin_registry().creators[name, "1", "edgevlm"]
    kinds = trt.PluginFieldType
    fields = [
        trt.PluginField(key, np.asarray([value], np.float32), kinds.FLOAT32)
        if isinstance(value, float)
        else trt.PluginField(key, np.asarray([value], np.int32), kinds.INT32)
        for key, value in attributes.items()
    ]
    collection, phase = trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD
    ahead = trt.QuickPluginCreationRequest.STRICT_AOT
    made = creator.create_plugin(name, "edgevlm", collection, phase, ahead)
    return dict(made.attrs)


def ask(trt: Any, plugin: Any, name: str, dtype: Any) -> dict[str, Any]:
    """What a plugin says for the shapes above, its tensors in `dtype`."""
    library = importlib.import_module("tensorrt_bindings.plugin._lib")
    tensors = importlib.import_module("tensorrt_bindings.plugin._tensor")
    builder = expressions(trt)
    tensors.SymIntExpr._exprBuilder = tensors.ShapeExpr._exprBuilder = builder
    shapes, numbers, always = SHAPES[name]
    attributes = given(trt, name, numbers)
    inputs = []
    for index, shape in enumerate(shapes):
        exprs = tensors.ShapeExprs.from_tuple([tensors.ShapeExpr(n) for n in shape])
        inputs.append(tensors.TensorDesc(exprs, trt.float32 if index in always else dtype))
    known = library.QDP_REGISTRY[f"edgevlm::{name}"]
    made = known.register_func(*inputs, *attributes.values())
    outputs = made if isinstance(made, tuple) else (made,)
    combos = known.autotune_func(*inputs, outputs)
    kernel, ptx, how, extra = known.aot_impl_func(*inputs, *attributes.values(), outputs, 0)

    def number(value: Any) -> int:
        return int(value._expr.value) if hasattr(value, "_expr") else int(value)

    return {
        "attributes": {key: float(value[0]) for key, value in attributes.items()},
        "outputs": [[number(n) for n in out.shape_expr] for out in outputs],
        "types": [out.dtype.name for out in outputs],
        "combinations": [combo.io_types for combo in combos],
        "grid": [number(how.grid_x), number(how.grid_y), number(how.grid_z)],
        "block": number(how.block_x),
        "shared": number(how.shared_mem),
        "extra": [number(extra[i]) for i in range(len(extra))],
        "kernel": kernel,
        "parameters": ptx.split(".entry")[1].split(")")[0].count(".param"),
    }


def main(folder: Path, sm: int = 87) -> None:
    """Print the answers of all plugins in all number formats, as JSON."""
    trt, plugin = load(folder)
    from edgevlm.engines.plugins import aot

    aot.define(("ms_deform_attn", "layer_merge", "rotary"), sm)
    kinds = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16}
    found = {
        f"{name}, {form}": ask(trt, plugin, name, kind)
        for name in SHAPES
        for form, kind in kinds.items()
    }
    print(json.dumps({"release": trt.__version__, "found": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
