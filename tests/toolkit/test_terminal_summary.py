"""What `export` and `inspect` say of checkpoints, bundles and saved profiles."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import BundleError
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule
from edgevlm.toolkit.terminal import summary
from edgevlm.training.torch_files import reader
from tests.conftest import HERE

CHECKPOINT = HERE / "goldens/e2e_llava15/llava-v1.5-tiny"


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("fp16", 2)])
def test_a_planned_bundle_counts_parameters(dtype: str, size: int, ready: Path) -> None:
    source = systems.load(CHECKPOINT, Options(torch_reader=reader()))
    data, lines, following = summary.planned_bundle(source, dtype, Path("out"))
    bundle = Bundle.open(ready / "bundle")
    for part in data["components"]:
        tensors = bundle.tensors(part["name"])
        shapes = source.weights[part["name"]]
        count = sum(math.prod(tensors.shape(name)) for name in shapes)
        assert (part["params"], part["bytes"]) == (count, count * size)
    assert data["bytes"] == sum(part["bytes"] for part in data["components"])
    assert (data["written"], data["dtype"], following) == (False, dtype, "")
    assert lines[-1].endswith(" to out")


def test_a_written_bundle_names_the_next_command(ready: Path) -> None:
    data, lines, following = summary.written_bundle(ready / "bundle", 123.44)
    on_disk = sum(f.nbytes for f in Bundle.open(ready / "bundle").manifest.files.values())
    assert (data["bytes"], data["peak_rss_mb"], data["kind"]) == (on_disk, 123.4, "bundle")
    assert (
        following == data["next"] == f"edgevlm build {ready / 'bundle'} {ready / 'bundle'}-engine"
    )
    assert lines[-1].startswith(f"{ready / 'bundle'}: ")


def test_components_are_listed_with_ports_and_states(ready: Path) -> None:
    manifest = Bundle.open(ready / "bundle").manifest
    lines = summary.component_lines(manifest)
    lm = next(line for line in lines if line.startswith("lm"))
    states = [
        p for p in Bundle.open(ready / "bundle").manifest.component("lm").outputs if p.updates
    ]
    assert f"-> logits (+{len(states)} states)" in lm
    assert "past." not in lm
    assert any("pixels -> features.0" in line for line in lines)


def test_a_plan_is_told_only_where_there_is_one() -> None:
    assert summary.plan_lines(PrecisionPlan()) == []
    plan = PrecisionPlan("int8_weights", (Rule("lm/layers.*", "int4_weights"),), method="nearest")
    assert summary.plan_lines(plan) == [
        "weights: int8_weights, int4_weights in lm/layers.* (nearest)"
    ]


def test_inspect_tells_a_bundle_by_what_it_holds(ready: Path) -> None:
    data, lines = summary.inspect_bundle(ready / "bundle")
    bundle = Bundle.open(ready / "bundle")
    assert data["sha256"] == bundle.sha256
    assert lines[0] == f"bundle of {bundle.model.name} (llava), fp32, opset {bundle.manifest.opset}"
    assert lines[-1] == "made by: tests"
    assert any(line.startswith("functions: ") and "CachedAttention" in line for line in lines)


def test_inspect_tells_a_checkpoint_by_its_parts() -> None:
    data, lines = summary.inspect_checkpoint(CHECKPOINT, Options(torch_reader=reader()))
    assert (data["kind"], data["system"]) == ("checkpoint", "llava")
    assert lines[0] == "checkpoint of system llava: clip, mlp, llama"


def test_a_profile_is_known_by_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    figures = {"engine": "e", "time_to_first_token_ms": 1.5, "inter_token_latency_ms": 2}
    path.write_text(json.dumps(figures | {"peak_rss_mb": 3, "more": 1}))
    data, lines = summary.inspect_profile(path)
    assert data["kind"] == "profile"
    assert any("time_to_first_token_ms" in line and "1.5" in line for line in lines)
    path.write_text(json.dumps(figures))
    with pytest.raises(BundleError, match="not a profile"):
        summary.inspect_profile(path)
