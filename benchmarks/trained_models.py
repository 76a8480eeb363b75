"""The models of benchmarks/trained.py: trained weights from packages, in many number formats."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT
from edgevlm import api
from edgevlm.calibration.calibrate import Calibration
from edgevlm.engines import manifest
from edgevlm.engines.manifest import Engine
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.manifest import TOKENIZER
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.toolkit.vlm.components import lm_component
from examples import small_vlm_parts as parts

PACKAGES = tuple(name for name in parts.PACKAGES if not name.startswith("easy-vqa"))
SIDE = 112  # pixels of an image: 8 x 8 patches
CONTEXT = 512
WINDOW, COUNT = 256, 12  # tokens of a window of text, and how many are scored
CALIBRATING = 32  # windows for `calibrate`, which holds every fourth out to choose with
SEED = 0
NOISE = " + noise"  # behind the names of what is made of the noisy weights
LEFT_OUT = "performance.md"  # changes with every measurement


@dataclass(frozen=True)
class Form:
    """An engine. precision: of `build`; calibrated: of the bundle that `calibrate` wrote."""

    precision: str | None = None
    calibrated: bool = False


FORMS: Mapping[str, Form] = {
    "float": Form(),
    "int8": Form("int8"),
    "int8-rows": Form("int8-rows"),
    "int8-blocks": Form("int8-blocks"),
    "int4": Form("int4"),
    "int4-blocks": Form("int4-blocks"),
    "int4 calibrated": Form(calibrated=True),
}
NOISY = ("float", "int8-rows", "int4-blocks", "int4 calibrated")


@dataclass(frozen=True)
class Text:
    """Ids. windows [COUNT, WINDOW] are scored; others are not, and are the file calibrating."""

    windows: Array
    others: Array
    calibrating: Path
    sha256: str


@dataclass(frozen=True)
class Made:
    """An engine; share_4_bits: of the weights of the language model's linears."""

    folder: Path
    engine: Engine
    share_4_bits: float

    @property
    def loss(self) -> float:
        """The loss of the language model that the build measured on random tokens; 0 in float."""
        lm = self.engine.parsed_vlm().lm.name
        losses = self.engine.build.precision_losses
        return max((x for name, x in losses.items() if name.startswith(lm)), default=0.0)

    @property
    def format(self) -> str:
        """How the language model's linears are computed."""
        lm = lm_component(self.engine.parsed_vlm().lm)
        keys = [k.removesuffix(".weight") for k, shape in lm.shapes.items() if len(shape) == 2]
        paths = [f"{lm.name}/{_path(k)}" for k in keys if k.startswith("layers.")]
        second = self.engine.prompt_form
        plans = [self.engine.plan, *([second.plan] if second else [])]
        counts = (Counter(plan.at(path) for path in paths).most_common() for plan in plans)
        return ", prompts ".join(" and ".join(name for name, _ in found) for found in counts)

    @property
    def lm_mb(self) -> float:
        """The language model's weights, both forms."""
        lm = self.engine.parsed_vlm().lm.name
        records = [r for r in self.engine.components if r.name == lm]
        second = self.engine.prompt_form
        files = {r.weights for r in (*records, *([second.record] if second else []))}
        return sum(self.engine.files[file].nbytes for file in files) / 1e6


def lacks(work: Path) -> str:
    """Why nothing can be measured; empty if all is there. Downloads 190 MB the first time."""
    needed = [name for name in ("onnx", "onnxruntime") if util.find_spec(name) is None]
    if needed:
        return f"{' and '.join(needed)} is not installed"
    packages = work / "packages"
    if packages.exists():
        return ""
    try:
        parts.download(packages, PACKAGES)
    except (subprocess.CalledProcessError, OSError):
        shutil.rmtree(packages, ignore_errors=True)
        return f"{', '.join(PACKAGES)} cannot be downloaded (pip says why)"
    return ""


def bundle(work: Path, noise: str) -> Path:
    """The float model, as published or with noise."""
    out, model = work / f"bundle{noise}", work / f"model{noise}"
    if not out.exists():
        made = parts.Made(SIDE, None, SEED if noise else None)
        shutil.rmtree(model, ignore_errors=True)
        parts.write_llava(model, work / "packages", SEED, made)
        api.export_bundle(model, out, max_context=CONTEXT)
        shutil.rmtree(model)
    return out


def text(work: Path) -> Text:
    """Windows of this project's documents; those that are scored are never calibrated with."""
    files = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != LEFT_OUT)
    content = "\n".join(path.read_text(encoding="utf-8") for path in files)
    folder = bundle(work, "")
    model = systems.load(folder, Options()).model
    tokenizer = Tokenizer.open(
        folder / TOKENIZER, model.prompts.sentencepiece, model.lm.config.vocab_size
    )
    ids = np.asarray(tokenizer.encode(content, special=False), np.int64)
    every = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    scored = _evenly(np.arange(len(every)), COUNT)
    others = _evenly(np.setdiff1d(np.arange(len(every)), scored), CALIBRATING)
    file = work / "calibrating.txt"
    file.write_text(tokenizer.decode(every[others].ravel().tolist()), encoding="utf-8")
    return Text(every[scored], every[others], file, hashlib.sha256(content.encode()).hexdigest())


def _path(key: str) -> str:
    layers, number, *modules = key.split(".")
    return "/".join((f"{layers}.{number}", *modules))


def _evenly(numbers: Array, count: int) -> Array:
    return np.asarray(numbers[np.linspace(0, len(numbers) - 1, count).round().astype(int)])


def engine(work: Path, name: str, noise: str, calibrating: Path) -> Made:
    """The engine in the form `name`. Any loss is accepted: it is what is measured here."""
    form, out = FORMS[name], work / f"engine {name}{noise}"
    source, share = bundle(work, noise), float(form.precision in ("int4", "int4-blocks"))
    if form.calibrated:
        source, share = _calibrated(work, noise, calibrating)
    if not out.exists():
        rounded = name != "float"
        api.build_engine(
            source, out, precision=form.precision, accept_loss=1.0 if rounded else None
        )
    return Made(out, manifest.read(out), share)


def _calibrated(work: Path, noise: str, calibrating: Path) -> tuple[Path, float]:
    """What `edgevlm calibrate --to int4` writes, and its share of weights in 4 bits."""
    out, kept = work / f"bundle calibrated{noise}", work / f"calibrated{noise}.json"
    if not kept.exists():
        found = api.calibrate(bundle(work, noise), out, text=calibrating, force=True)
        assert isinstance(found, Calibration)
        facts = {"growth": found.quality.growth, "within_budget": found.within_budget}
        kept.write_text(json.dumps({"share_4_bits": found.share_4_bits, **facts}))
    return out, calibration(work, noise)["share_4_bits"]


def calibration(work: Path, noise: str) -> dict[str, Any]:
    """What `calibrate` said of itself: share_4_bits, growth of perplexity on the text that it
    chooses by, within_budget.
    """
    facts: dict[str, Any] = json.loads((work / f"calibrated{noise}.json").read_text())
    return facts
