"""The estimate before a build, against what an engine then holds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgevlm.calibration import weight_only
from edgevlm.engines import manifest
from edgevlm.engines.build.build import Request, build
from edgevlm.engines.manifest import PREFILL_CHUNK
from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.memory import Estimate, estimate
from edgevlm.engines.runtime.session import Session
from edgevlm.export.write import describe, write_bundle
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.manifest import FORMAT, Bundle, Manifest
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.errors import OutOfMemory
from edgevlm.toolkit.systems import find
from edgevlm.toolkit.target import parse
from edgevlm.toolkit.vlm import components
from tests.conftest import HERE
from tests.pipeline import engine_of, silent

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
    lm = components.components(bundle.model)[-1]
    axes = {"batch": 1, "context": context}
    states = [p for p in lm.inputs if p.name in {o.updates for o in lm.outputs if o.updates}]
    sizes = [math.prod(axes[n] if isinstance(n, str) else n for n in p.shape) for p in states]
    assert states
    assert found.cache_bytes == 4 * sum(sizes)
    assert found.context == context


def planned(name: str) -> Bundle:
    """A preset's bundle, as far as an estimate looks at it."""
    model = find(systems.presets()[name]).PRESETS[name]()
    parts = tuple(describe(part, "", "") for part in components.components(model))
    manifest = Manifest(FORMAT, "tests", {}, {}, "fp16", 24, parts, (), {}, {})
    return Bundle(Path(), manifest, model)


@pytest.mark.parametrize("name", systems.presets())
def test_every_preset_has_an_estimate(name: str) -> None:
    bundle = planned(name)
    lm = bundle.model.lm.config
    here, there = (estimate(bundle, parse(t), 1024) for t in ("cpu", "jetson-agx-orin"))
    assert here.weights_bytes == 2 * there.weights_bytes
    assert here.cache_bytes == 2 * there.cache_bytes
    assert here.cache_bytes == 4 * 2 * lm.num_layers * lm.num_kv_heads * lm.head_dim * 1024
    # A block's input, gate, up and their product live at the same time, for one piece of a prompt.
    assert here.activations_bytes >= 4 * PREFILL_CHUNK * (lm.hidden_size + 3 * lm.intermediate_size)
    longer = estimate(bundle, parse("cpu"), 4096)
    assert longer.weights_bytes == here.weights_bytes
    assert longer.cache_bytes == 4 * here.cache_bytes
    assert longer.activations_bytes >= here.activations_bytes


def test_images_count_where_they_are_larger_than_the_prompt() -> None:
    """A ConvNeXt's first stage at 1536 pixels: a quarter of the sides, 4 x 192 channels wide."""
    found = estimate(planned("convllava-0.5b-1536"), parse("cpu"), 64)
    assert found.activations_bytes >= 4 * 384 * 384 * (192 + 4 * 192)


@pytest.mark.parametrize("kind", weight_only.KINDS)
def test_weights_in_few_bits_are_what_the_files_hold(kind: str, tmp_path: Path) -> None:
    """Tiny models have blocks of 16 to 64 where an estimate takes 128: some more of scales."""
    source = replace(systems.load(CHECKPOINTS["llava"], Options()), plan=weight_only.plan(kind))
    write_bundle(source, tmp_path / "b", made_by="tests", progress=silent)
    found = estimate(Bundle.open(tmp_path / "b"), parse("cpu"), 64).weights_bytes
    held = sum(
        entry.nbytes
        for path in (tmp_path / "b").glob("*.safetensors")
        for key, entry in SafetensorsFile(path).entries.items()
        if not key.endswith(".scale") and "rotary" not in key
    )
    assert held < found < 1.1 * held


def test_an_engine_that_does_not_fit_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(CHECKPOINTS["llava"], tmp_path)
    needed = memory.of_engine(manifest.read(engine))
    monkeypatch.setattr(memory, "available_bytes", lambda: needed.total_bytes - 1)
    with pytest.raises(OutOfMemory, match="MB are free") as caught:
        Session.open(engine)
    for setting in ("--precision", "--max-context", "--max-image-tiles"):
        assert setting in caught.value.hint
    monkeypatch.setattr(memory, "available_bytes", lambda: needed.total_bytes)
    Session.open(engine).close()
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(OutOfMemory, match="largest component"):
        build(tmp_path / "bundle", tmp_path / "never", request(), silent)
    assert not (tmp_path / "never").exists()


def request() -> Request:
    return Request(parse("cpu"), None, False, "tests")


def test_memory_is_that_of_the_machine_or_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = memory.available_bytes()
    assert whole is None or 1e8 < whole < 1e14
    assert memory._left_in_container(tmp_path) is None
    container(tmp_path, "memory.max", "max", "memory.current", "active_file 3\ninactive_file 40")
    assert memory._left_in_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._left_in_container(tmp_path) == 1000 - (500 - 43)
    old = tmp_path / "v1"
    names = "memory.limit_in_bytes", "memory.usage_in_bytes"
    stat = "active_file 1\ntotal_active_file 3\ntotal_inactive_file 40\nmapped_file 7"
    container(old / "memory", names[0], "1000", names[1], stat)
    assert memory._left_in_container(old) == 1000 - (500 - 43)


def container(folder: Path, limit: str, most: str, used: str, stat: str) -> None:
    """A cgroup's files as Linux shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit).write_text(f"{most}\n")
    (folder / used).write_text("500\n")
    (folder / "memory.stat").write_text(f"anon 450\n{stat}\n")


def test_the_whole_is_the_sum() -> None:
    assert Estimate(1, 20, 300, 7).total_bytes == 321


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux forgets a peak")
def test_a_peak_can_be_forgotten() -> None:
    memory.forget_peak()
    before = memory.peak_rss_mb()
    held = np.ones(40_000_000, np.float32)
    high = memory.peak_rss_mb()
    assert high > before + 100
    assert held.sum() > 0
    del held
    assert memory.peak_rss_mb() > high - 5  # the kernel counts in batches of pages
    memory.forget_peak()
    assert memory.peak_rss_mb() < high - 100
