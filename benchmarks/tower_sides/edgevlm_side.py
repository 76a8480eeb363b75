"""edgevlm: an engine's runners, one component after another, as a session runs them."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.tower_sides import walk
from edgevlm import __version__
from edgevlm.engines import backends, manifest
from edgevlm.engines.backends import RunnerOptions
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.strict import from_plain
from edgevlm.toolkit.target import this_cpu


def open_engine(model: walk.Model, options: Namespace) -> tuple[walk.Encode, dict[str, str]]:
    """--set engine=FOLDER."""
    folder = Path(options.settings["engine"])
    if model.alone:
        return _open_part(model, options)
    engine = manifest.read(folder)
    backend = backends.backend(engine.parsed_target())
    wanted, how = (
        {part.name for part in model.parts},
        RunnerOptions(1, options.threads, plugins=engine.plugins),
    )
    runners = {
        record.name: backend.open(folder, record, engine.model, how)
        for record in engine.components
        if record.name in wanted
    }

    def encode(pixels: Mapping[str, Any]) -> Any:
        return model.run(lambda name, inputs: runners[name].run(inputs), pixels)

    return encode, {"edgevlm": __version__, "onnxruntime": onnxruntime.__version__}


def _open_part(model: walk.Model, options: Namespace) -> tuple[walk.Encode, dict[str, str]]:
    """One component that `make.py --part` lowered."""
    folder = Path(options.settings["engine"])
    data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    record = from_plain(ComponentRecord, data["components"][0], "manifest.json")
    how = RunnerOptions(1, options.threads)
    runner = backends.backend(this_cpu()).open(folder / "engine", record, {}, how)

    def encode(pixels: Mapping[str, Any]) -> Any:
        return model.run(lambda name, inputs: runner.run(inputs), pixels)

    return encode, {"edgevlm": __version__, "onnxruntime": onnxruntime.__version__}


if __name__ == "__main__":
    walk.measure(open_engine)
