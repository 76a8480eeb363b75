"""Engines: engine.json, graphs and weights, opened and asked as `run` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random

from edgevlm.engines import manifest
from edgevlm.engines.build import summary
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.errors import ToolkitError
from tests.fuzz.artifacts import Artifact, Folder
from tests.fuzz.frame import Place, Violation, laid_out, refused

_LM = ("model", "lm", "config")
_ODD = {
    "graph outside": {("components", 0, "graph"): "../elsewhere/x.onnx"},
    "absolute graph": {("components", 2, "graph"): "/etc/passwd"},
    "weights above": {("components", 1, "weights"): "../merger.safetensors"},
    "file outside": {("files", ".."): {"nbytes": 1, "sha256": ""}},
    "context 1e18": {("context",): 1 << 62},
    "context 0": {("context",): 0},
    "context beyond the tables": {("context",): 1 << 20},
    "huge seconds": {("build", "seconds"): 10**400},
    "no number": {("build", "kernel_differences", "lm"): float("nan")},
    "1e7 layers": {(*_LM, "num_layers"): 10**7},
    "vocabulary of 1e12": {(*_LM, "vocab_size"): 10**12},
    "no tiles": {("max_image_tiles",): 0},
    "no templates": {("model", "prompts", "template"): "unheard"},
    "no checksums": {("checksums",): {}},
}


class Engines:
    """The tiny LLaVA-1.5's engine, with files that are changed."""

    name = "engines"
    share = 1

    def __init__(self, place: Place) -> None:
        self._folder = Folder(place.ready / "engine-cpu", manifest.DESCRIPTION)
        self._work = place.work
        self._expected = _asked(self._folder.base)

    def seeds(self) -> Mapping[str, Artifact]:
        """The engine as it is, damaged, and with what once did harm."""
        return self._folder.seeds(_ODD)

    def mutate(self, rng: Random, seed: Artifact) -> Artifact:
        """One file more changed."""
        return self._folder.mutate(rng, seed)

    def check(self, case: Artifact) -> str:
        """The engine is refused, or answers; damage is refused."""
        with laid_out(self._folder.base, case, self._work) as folder:
            try:
                summary.inspect_engine(folder)
                manifest.check(folder, manifest.read(folder))
                if case.damaged:
                    raise Violation("damage was not found")
                answer = _asked(folder)
            except ToolkitError as error:
                return refused(error)
        if not case.files and answer != self._expected:
            raise Violation(f"{answer} from the engine as it was built, not {self._expected}")
        return "answered"


def _asked(folder: Path) -> tuple[int, ...]:
    with Session.open(folder, threads=1) as session:
        return session.answer(Question("What?", (), 3)).token_ids
