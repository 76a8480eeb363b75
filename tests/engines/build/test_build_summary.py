"""What `build` and `inspect` say of an engine, planned, built or on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgevlm.calibration import weight_only
from edgevlm.engines import manifest
from edgevlm.engines.build import summary
from edgevlm.engines.build.build import Request, build
from edgevlm.engines.manifest import Built, Engine, Trial
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.target import parse, this_cpu
from tests.pipeline import requantized, silent

PLAIN = Request(this_cpu(), None, False, "tests")


@pytest.fixture
def engine(ready: Path) -> Engine:
    return manifest.read(ready / "engine-cpu")


def with_errors(
    engine: Engine, kernels: dict[str, float], losses: dict[str, float], accepted: float | None
) -> Engine:
    return replace(engine, precision="int8", build=Built(2.0, 100.0, kernels, losses, accepted))


def test_a_plan_tells_memory_and_writes_nothing(ready: Path) -> None:
    data, lines, following = summary.planned_engine(ready / "bundle", PLAIN, explain=False)
    memory = data["memory"]
    parts = ("weights_bytes", "cache_bytes", "activations_bytes")
    assert memory["total_bytes"] == sum(memory[part] for part in parts)
    stored = [SafetensorsFile(file) for file in (ready / "bundle").glob("*.safetensors")]
    assert memory["weights_bytes"] == sum(e.nbytes for f in stored for e in f.entries.values())
    assert data["written"] is False
    assert following == ""
    text = "\n".join(lines)
    assert "KV cache" in text
    assert "GroupQueryAttention" not in text
    smaller, _, _ = summary.planned_engine(
        ready / "bundle", replace(PLAIN, context=16), explain=False
    )
    whole = memory["cache_bytes"] * 16 / data["memory"]["context"]
    assert smaller["memory"]["cache_bytes"] == whole


def test_a_plan_explains_the_lowering_that_a_build_does(ready: Path, tmp_path: Path) -> None:
    request = requantized(ready / "bundle", "int8")
    data, lines, _ = summary.planned_engine(ready / "bundle", request, explain=True)
    made, _ = build(ready / "bundle", tmp_path / "e", request, silent)
    decided = [(d.component, d.op, d.count, d.action, d.into, d.why) for d in made.lowering]
    keys = ("component", "op", "count", "action", "into", "why")
    assert [tuple(d[key] for key in keys) for d in data["lowering"]] == decided
    assert any("com.microsoft.MatMulNBits" in line for line in lines)


def test_a_plan_refuses_what_the_build_would(ready: Path) -> None:
    with pytest.raises(ConfigError, match="no effect"):
        summary.planned_engine(ready / "bundle", replace(PLAIN, accept_loss=0.5), explain=False)


def test_what_was_built_ends_with_both_figures(engine: Engine, tmp_path: Path) -> None:
    kernels, losses = {"merger": 2e-4, "lm": 1e-3}, {"merger": 0.001, "lm": 0.0081}
    errors = with_errors(engine, kernels, losses, None)
    data, lines, following = summary.built_engine(errors, tmp_path / "e", True, explain=False)
    assert lines[-1].endswith(
        "in 2.0 s; kernels right to 1.0e-03; int8 costs 0.81 % (rms, lm) against float"
    )
    assert data["already_built"] is False
    assert data["build"]["kernel_differences"] == kernels
    assert data["build"]["precision_losses"] == losses
    assert "model" not in data
    assert following == data["next"]
    assert following.startswith(f"edgevlm run {tmp_path / 'e'} ")


def test_an_engine_that_stayed_in_float_says_so(engine: Engine, tmp_path: Path) -> None:
    trials = (
        Trial("lm", "token", "int8_rows", 2.0, chosen=False),
        Trial("lm", "token", "float", 1.0, chosen=True),
    )
    stayed = replace(with_errors(engine, {"lm": 1e-7}, {"lm": 2e-7}, None), trials=trials)
    _, lines, _ = summary.built_engine(stayed, tmp_path / "e", True, explain=False)
    assert "nothing is in int8, as float is faster here (--keep-slower" in lines[-1]
    assert summary.percent(2e-7) == "less than 0.001 %"


def test_an_accepted_loss_is_told(engine: Engine, tmp_path: Path) -> None:
    errors = with_errors(engine, {"lm": 1e-3}, {"lm": 0.4}, 0.5)
    _, lines, _ = summary.built_engine(errors, tmp_path / "e", False, explain=True)
    assert lines[-1].endswith("int8 costs 40 % (rms, lm) against float; 50 % was accepted")
    assert "already built (2.0 s saved)" in lines[-1]
    assert any("edgevlm.CachedAttention" in line for line in lines)


def test_a_float_engine_has_no_loss(engine: Engine, ready: Path) -> None:
    _, lines = summary.inspect_engine(ready / "engine-cpu")
    assert lines[0].startswith(f"engine for {this_cpu()} of {ready / 'bundle'}, fp32, context ")
    assert "against float" not in lines[-1]
    assert lines[-1].startswith("kernels right to ")
    for name, error in engine.build.kernel_differences.items():
        row = next(line for line in lines if line.startswith(name) and "e-" in line)
        assert f"{error:.1e}" in row
        assert row.rstrip().endswith("-")


def test_inspect_shows_plan_and_both_figures(ready: Path, tmp_path: Path) -> None:
    made, _ = build(ready / "bundle", tmp_path / "e", requantized(ready / "bundle", "int8"), silent)
    data, lines = summary.inspect_engine(tmp_path / "e")
    assert data["kind"] == "engine"
    assert data["build"]["precision_losses"] == made.build.precision_losses
    assert f"weights: int8_weights ({weight_only.plan('int8').method})" in lines
    worst = max(made.build.precision_losses.values())
    assert f"costs {summary.percent(worst)} (rms" in lines[-1]


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "-"), (0.0081, "0.81 %"), (0.4, "40 %"), (0.71157, "71 %"), (0, "0 %")],
)
def test_percent(share: float | None, text: str) -> None:
    assert summary.percent(share) == text


def test_a_plan_for_a_card_names_the_devices_that_have_it(ready: Path) -> None:
    card = replace(PLAIN, target=parse("onnxruntime-cuda@1.31.1/sm_89"))
    data, lines, _ = summary.planned_engine(ready / "bundle", card, explain=True)
    assert {"rtx-4090", "l4"} <= set(data["time"])
    assert any("ScatterElements" in line for line in lines)  # the bundle is in fp32
