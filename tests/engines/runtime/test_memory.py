"""The estimate before a build, against what an engine then holds."""

from __future__ import annotations

import json
import subprocess
import sys
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
from edgevlm.toolkit import systems, target
from edgevlm.toolkit.bundle.manifest import FORMAT, Bundle, Manifest
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.errors import OutOfMemory
from edgevlm.toolkit.systems import find
from edgevlm.toolkit.target import parse
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.config import ModelConfig
from tests.conftest import HERE, ROOT
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
    held = sum(entry.nbytes for file in files for entry in file.entries.values())
    assert found.weights_bytes == held
    lm = bundle.vlm.lm.config
    cache = np.zeros((lm.num_layers, 2, lm.num_kv_heads, context, lm.head_dim), np.float32)
    assert found.cache_bytes == cache.nbytes
    assert found.context == context
    opened = memory.of_engine(manifest.read(out))  # by its files, which have headers
    assert 0 <= opened.weights_bytes - held < 4096 * len(files) + 0.05 * held
    assert replace(opened, weights_bytes=held) == found


def planned(name: str) -> Bundle:
    """A preset's bundle, as far as an estimate looks at it."""
    model = find(systems.presets()[name]).PRESETS[name]()
    parts = tuple(describe(part, "", "") for part in components.components(model))
    manifest = Manifest(FORMAT, "tests", {}, {}, "fp16", 24, parts, (), {}, {})
    return Bundle(Path(), manifest, model)


@pytest.mark.parametrize("name", systems.presets())
def test_every_preset_has_an_estimate(name: str) -> None:
    bundle = planned(name)
    lm = bundle.vlm.lm.config
    here, there = (estimate(bundle, parse(t), 1024) for t in ("cpu", "jetson-agx-orin"))
    tables = 4 * _table_elements(bundle.vlm)  # in float32 everywhere
    assert here.weights_bytes - tables == 2 * (there.weights_bytes - tables)
    assert here.cache_bytes == 2 * there.cache_bytes
    assert here.cache_bytes == 4 * 2 * lm.num_layers * lm.num_kv_heads * lm.head_dim * 1024
    # A block's input, gate, up and their product live at the same time, for one piece of a prompt.
    assert here.activations_bytes >= 4 * PREFILL_CHUNK * (lm.hidden_size + 3 * lm.intermediate_size)
    longer = estimate(bundle, parse("cpu"), 4096)
    assert longer.weights_bytes == here.weights_bytes
    assert longer.cache_bytes == 4 * here.cache_bytes
    assert longer.activations_bytes >= here.activations_bytes


def _table_elements(model: ModelConfig) -> int:
    """Rotary tables: cosines and sines of a language model, angles of MLCD's patches."""
    lm = model.lm.config
    patches = [
        p.config.tokens * p.config.hidden_size // p.config.num_heads // 2
        for p in model.encoders
        if p.kind == "mlcd"
    ]
    return int(lm.context * lm.head_dim + sum(patches))


def test_the_largest_op_is_found() -> None:
    """Of Vicuna-7B reading 256 tokens: gate, up and their product, twice, and the scores."""
    found = estimate(planned("llava-1.5-7b"), parse("cpu"), 1024).activations_bytes
    assert found == 4 * (2 * 3 * 256 * 11008 + 32 * 256 * 1024)


def test_an_encoder_sees_one_view_at_a_time_and_the_merger_all() -> None:
    """LLaVA-NeXT: up to 5 views of 576 tokens."""
    model = planned("llava-next-0.5b")
    tiling = model.model.images.tiling
    assert tiling is not None
    views = 1 + max(w * h // tiling.tile**2 for w, h in tiling.pinpoints)
    merger = views * 576 * (1024 + 896)  # its first product
    assert 2 * 577 * 4096 < merger < views * 2 * 577 * 4096  # activations of the encoder's MLP
    scores = 14 * 64 * 64
    assert estimate(model, parse("cpu"), 64).activations_bytes == 4 * (2 * merger + scores)


def test_a_processor_computes_in_float32_and_others_in_the_bundles_type() -> None:
    cpu, jetson = parse("cpu"), parse("jetson-agx-orin")
    assert [memory.element_bytes(cpu, d) for d in ("fp32", "fp16", "bf16")] == [4, 4, 4]
    assert [memory.element_bytes(jetson, d) for d in ("fp32", "fp16", "bf16")] == [4, 2, 2]


def test_images_count_where_they_are_larger_than_the_prompt() -> None:
    """A ConvNeXt's first stage at 1536 pixels: a quarter of the sides, 4 x 192 channels wide."""
    found = estimate(planned("convllava-0.5b-1536"), parse("cpu"), 64)
    assert found.activations_bytes >= 4 * 384 * 384 * (192 + 4 * 192)


@pytest.mark.parametrize("kind", weight_only.KINDS)
def test_weights_in_few_bits_are_what_the_files_hold(kind: str, tmp_path: Path) -> None:
    source = replace(systems.load(CHECKPOINTS["llava"], Options()), plan=weight_only.plan(kind))
    write_bundle(source, tmp_path / "b", dtype="fp32", made_by="tests", progress=silent)
    found = estimate(Bundle.open(tmp_path / "b"), parse("cpu"), 64).weights_bytes
    files = [SafetensorsFile(path) for path in (tmp_path / "b").glob("*.safetensors")]
    assert found == sum(entry.nbytes for file in files for entry in file.entries.values())


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


def test_on_a_card_its_own_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    needed, on_card = memory.Estimate(1000, 0, 0, 64), parse("onnxruntime-cuda/sm_89")
    monkeypatch.setattr(memory, "available_bytes", lambda: 10)
    monkeypatch.setattr(target.card, "free_bytes", lambda: 2000)
    memory.require(needed, "it", on_card)
    with pytest.raises(OutOfMemory):
        memory.require(needed, "it", parse("cpu"))
    monkeypatch.setattr(target.card, "free_bytes", lambda: 999)
    with pytest.raises(OutOfMemory, match="999"):
        memory.require(needed, "it", on_card)
    monkeypatch.setattr(target.card, "free_bytes", lambda: None)  # nobody can say
    memory.require(needed, "it", on_card)


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


# In a process of its own: it holds nothing that something else has left in it.
PEAKS = """
import json
import numpy as np
from edgevlm.engines.runtime import memory
peaks = []
def forget():
    memory.forget_peak()
    peaks.append(memory.peak_rss_mb())
forget()
held = np.ones(40_000_000, np.float32)
peaks.append(memory.peak_rss_mb())
del held
peaks.append(memory.peak_rss_mb())
forget()
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux forgets a peak")
def test_a_peak_can_be_forgotten() -> None:
    command = [sys.executable, "-c", PEAKS]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    before, high, kept, after = json.loads(done.stdout)
    assert high > before + 100
    assert kept > high - 5  # the kernel counts in batches of pages
    assert after < high - 100
