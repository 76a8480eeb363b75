"""The estimate before a build, against what an engine then holds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from engines.build import Request, build
from engines.memory import Estimate, estimate
from export.write import describe, write_bundle
from tests.conftest import HERE
from tests.pipeline import silent
from toolkit import systems
from toolkit.bundle import FORMAT, Bundle, Manifest
from toolkit.layouts.source import Options
from toolkit.models import vlm
from toolkit.safetensors_io import SafetensorsFile
from toolkit.systems import find
from toolkit.target import parse

CHECKPOINTS = {
    "llava": HERE / "goldens/e2e_llava15/llava-v1.5-tiny",
    "convllava": HERE / "goldens/e2e_convllava/convllava-tiny",
    "views": HERE / "goldens/mlcd_llavanext_e2e",
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("context", [64, 2048])
def test_weights_and_cache_are_those_of_the_engine(name: str, context: int, tmp_path: Path) -> None:
    source = systems.load(CHECKPOINTS[name], Options())
    folder, out = tmp_path / "bundle", tmp_path / "engine"
    write_bundle(source, folder, dtype="fp32", made_by="tests", force=False, progress=silent)
    bundle, target = Bundle.open(folder), parse("cpu")
    found = estimate(bundle, target, context)
    build(folder, out, Request(target, context, False, "tests"), silent)
    files = [SafetensorsFile(path) for path in out.glob("*.safetensors")]
    assert files
    held = sum(e.nbytes for file in files for k, e in file.entries.items() if "rotary" not in k)
    assert found.weights_bytes >= held
    lm = vlm.components(bundle.model)[-1]
    axes = {"batch": 1, "context": context}
    states = [p for p in lm.inputs if p.name in {o.updates for o in lm.outputs if o.updates}]
    sizes = [math.prod(axes[n] if isinstance(n, str) else n for n in p.shape) for p in states]
    assert states
    assert found.cache_bytes == 4 * sum(sizes)
    assert found.context == context


def planned(name: str) -> Bundle:
    """A preset's bundle, as far as an estimate looks at it."""
    model = find(systems.presets()[name]).PRESETS[name]()
    parts = tuple(describe(part, "", "") for part in vlm.components(model))
    manifest = Manifest(FORMAT, "tests", {}, {}, "fp16", 24, parts, (), {}, {})
    return Bundle(Path(), manifest, model)


@pytest.mark.parametrize("name", systems.presets())
def test_every_preset_has_an_estimate(name: str) -> None:
    bundle = planned(name)
    lm = bundle.model.lm.config
    here, there = (estimate(bundle, parse(t), 1024) for t in ("cpu", "jetson-agx-orin"))
    assert here.weights_bytes == 2 * there.weights_bytes
    assert here.cache_bytes == 2 * there.cache_bytes
    assert here.cache_bytes == 4 * 2 * lm.depth * lm.kv_heads * lm.head_dim * 1024
    # A block's input, gate, up and their product live at the same time.
    assert here.activations_bytes >= 4 * 1024 * (lm.width + 3 * lm.mlp)
    longer = estimate(bundle, parse("cpu"), 4096)
    assert longer.weights_bytes == here.weights_bytes
    assert longer.cache_bytes == 4 * here.cache_bytes
    assert longer.activations_bytes >= here.activations_bytes


def test_pictures_count_where_they_are_larger_than_the_prompt() -> None:
    """A ConvNeXt's first stage at 1536 pixels: a quarter of the sides, 4 x 192 channels wide."""
    found = estimate(planned("convllava-0.5b-1536"), parse("cpu"), 64)
    assert found.activations_bytes >= 4 * 384 * 384 * (192 + 4 * 192)


def test_the_whole_is_the_sum() -> None:
    assert Estimate(1, 20, 300, 7).total_bytes == 321
