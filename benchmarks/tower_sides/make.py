"""A preset as a bundle whose language model has one layer: `make.py PRESET OUT`.

What is measured here is in front of the language model. `make.py --graphs BUNDLE OUT` writes the
bundle's graphs with our functions inlined, for programs that know standard ops alone.
"""

from __future__ import annotations

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


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    if first == "--graphs":
        graphs(*map(Path, rest))
    else:
        bundle(first, Path(rest[0]))
