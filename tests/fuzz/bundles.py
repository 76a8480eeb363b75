"""Bundles: manifests, graphs, weights and goldens, read as `build` and `export` do."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from random import Random

from edgevlm.engines.build.build import Request, build, lowering
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.manifest import GOLDENS, Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import ToolkitError
from edgevlm.toolkit.target import this_cpu
from edgevlm.toolkit.terminal import summary
from tests.fuzz.artifacts import Artifact, Folder
from tests.fuzz.frame import Place, Violation, laid_out, refused
from tests.pipeline import silent

_LM = ("model", "lm", "config")
_RULES = [{"paths": "*" * 20 + "a", "precision": "int8"}] * 50_000
_ODD = {
    "file outside": {("files", "../x"): {"nbytes": 1, "sha256": ""}},
    "weights above": {("components", 0, "weights"): ".."},
    "graph outside": {("components", 0, "graph"): "../elsewhere/x.onnx"},
    "absolute graph": {("components", 0, "graph"): "/etc/passwd"},
    "1e7 layers": {(*_LM, "num_layers"): 10**7},
    "1e18 layers": {(*_LM, "num_layers"): 1 << 62},
    "1e7 linears": {("model", "merger", "config", "layers"): 10**7},
    "tap 1e9": {("model", "encoders", 0, "config", "taps"): [10**9]},
    "image of 1e9": {("model", "encoders", 0, "config", "image_size"): 10**9},
    "400 digits": {(*_LM, "theta"): 10**400},
    "50,000 rules": {("plan", "rules"): _RULES},
    "no number": {(*_LM, "eps"): float("nan")},
}


class Bundles:
    """The tiny LLaVA-1.5's bundle, with files that are changed."""

    name = "bundles"
    share = 1

    def __init__(self, place: Place) -> None:
        self._place = place
        self._folder = Folder(place.ready / "bundle", "manifest.json")

    def seeds(self) -> Mapping[str, Artifact]:
        """The bundle as it is, damaged, and with what once did harm."""
        return self._folder.seeds(_ODD)

    def mutate(self, rng: Random, seed: Artifact) -> Artifact:
        """One file more changed."""
        return self._folder.mutate(rng, seed)

    def check(self, case: Artifact) -> str:
        """The bundle is refused, or can be built and written again."""
        with laid_out(self._folder.base, case, self._place.work) as folder:
            try:
                summary.inspect_bundle(folder)
                bundle = Bundle.open(folder)
                bundle.verify()
                if case.damaged:
                    raise Violation("damage was not found")
                goldens.load(folder / GOLDENS)
                source = systems.load(folder, Options())
                summary.planned_bundle(source, "fp32", self._place.work / "out")
                request = Request(this_cpu(), None, False, "fuzz")
                lowering(bundle, request)
                if not case.deep:
                    return "read"
                return self._built(folder, request)
            except ToolkitError as error:
                return refused(error)

    def _built(self, folder: Path, request: Request) -> str:
        out = self._place.work / "engine"
        try:
            build(folder, out, request, silent)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        return "built"
