"""A preset as a bundle whose language model has one layer: `make.py PRESET OUT`.

What is measured here is in front of the language model. `make.py --graphs BUNDLE OUT` writes the
bundle's graphs with our functions inlined, for programs that know standard ops alone; `make.py
--part PRESET COMPONENT PRECISION OUT` one component by itself.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from edgevlm import api
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Source, random_source
from edgevlm.toolkit.vlm.presets import tokenizer

CONTEXT = 1024


def shortened(name: str) -> Source:
    """The preset with random weights, seed 0."""
    model = systems.find(systems.presets()[name]).PRESETS[name]()
    config = replace(model.lm.config, num_layers=1, context=CONTEXT)
    model = replace(model, lm=replace(model.lm, config=config))
    return random_source(model, 0, tokenizer(model), name)


def bundle(name: str, out: Path) -> None:
    """The bundle in float32."""
    api.write_source(shortened(name), name, out, dtype="fp32", force=False, progress=None)


def graphs(source: Path, out: Path) -> None:
    """Standard ops alone; the weights are the same files."""
    import onnx
    import onnx.inliner

    out.mkdir(parents=True)
    shutil.copy(source / "manifest.json", out)
    for file in source.glob("*.safetensors"):
        os.link(file, out / file.name)  # OpenVINO follows no link out of the folder
    for file in source.glob("*.onnx"):
        model = onnx.load(str(file), load_external_data=False)
        whole = onnx.inliner.inline_local_functions(model) if model.functions else model
        (out / file.name).write_bytes(whole.SerializeToString())


def part(name: str, alone: str, precision: str, out: Path) -> None:
    """One component of a preset in a folder of its own: recorded as a bundle has it, and lowered
    below `engine` as a build does, but compared with nothing: the reference takes minutes.
    """
    from edgevlm.calibration import weight_only
    from edgevlm.engines import backends
    from edgevlm.engines.build import shapes
    from edgevlm.export import write
    from edgevlm.toolkit.quantization.plan import PrecisionPlan
    from edgevlm.toolkit.strict import to_plain
    from edgevlm.toolkit.target import this_cpu
    from edgevlm.toolkit.vlm import components

    source, target = shortened(name), this_cpu()
    (component,) = (c for c in components.components(source.model) if c.name == alone)
    plan = PrecisionPlan() if precision == "float32" else weight_only.plan("int8-rows")
    recorded = write.record(component, "fp32", plan)
    (out / "engine").mkdir(parents=True)
    write.write_graph(out, recorded, "part.onnx", "part.safetensors", source.weights[alone])
    record = write.describe(component, "part.onnx", "part.safetensors")
    sizes = shapes.of(alone, source.model, CONTEXT)
    compiled = backends.backend(target).compile(out, "fp32", record, out / "engine", target, sizes)
    described = {
        "preset": name,
        "components": to_plain([compiled.record]),
        "edges": to_plain(list(components.edges(source.model))),
    }
    (out / "manifest.json").write_text(json.dumps(described), encoding="utf-8")


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    if first == "--graphs":
        graphs(*map(Path, rest))
    elif first == "--part":
        preset, component, precision, out = rest
        part(preset, component, precision, Path(out))
    else:
        bundle(first, Path(rest[0]))
