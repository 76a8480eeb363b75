"""selftest: fused plugins and engines tried on a machine with a stood-in card, into one report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from edgevlm.engines.backends.tensorrt import plugins
from edgevlm.engines.build import check, selftest
from edgevlm.engines.build import plugins as choice
from edgevlm.engines.lowering.lower import lower_component
from edgevlm.engines.plugins.alone import alone
from edgevlm.engines.plugins.catalogue import SITES, SMALL
from edgevlm.export import probe
from edgevlm.toolkit.errors import TargetMismatch
from edgevlm.toolkit.target import Target
from tests.conftest import HERE
from tests.engines.backends.tensorrt.machine import installed
from tests.onnx_tools import model_of, run
from tests.pipeline import engine_of
from tests.test_pipeline import Shell, shell  # noqa: F401

ONE_EACH = (SMALL[0], SMALL[2], SMALL[4])
OPS = ("MSDeformAttn", "LayerMerge", "RotaryAttention")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Makes machines; one call of each op in place of all, no kernels but the engines' own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plugins, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(selftest, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(selftest, "_kernels", lambda sites, seed: {"rows": [], "seed": seed})
    monkeypatch.setattr(selftest, "_BATCHES", 1)
    monkeypatch.setattr(selftest, "_RUNS", 2)
    yield lambda release: installed(release, monkeypatch, tmp_path / "packages")


def library(target: Target) -> None:
    """A library with what deformable attention does."""
    part = alone(SMALL[0], "fp32", np.random.default_rng(0))
    model = model_of(part.component, part.weights)
    lower_component("c", model, Target("tensorrt", (10, 7), "sm_87"), ["MSDeformAttn"])
    file = plugins.library_file(target)
    file.parent.mkdir(parents=True)
    file.write_bytes(onnx.ModelProto(functions=model.functions).SerializeToString())


@pytest.mark.parametrize("site", SMALL, ids=lambda site: site.name)
def test_a_call_alone_means_what_the_op_does(site: Any) -> None:
    part = alone(site, "fp32", np.random.default_rng(1))
    model = model_of(part.component, part.weights)
    lower_component("c", model, Target("tensorrt", (10, 13), "sm_87"))
    found = run(model, part.inputs)
    np.testing.assert_allclose(found["y"], part.expected["y"], atol=2e-5)
    assert {s.op for s in SITES} == {*OPS}


def test_plugins_are_built_compared_and_timed(
    here: Any,
    monkeypatch: pytest.MonkeyPatch,
    shell: Shell,  # noqa: F811
    tmp_path: Path,
) -> None:
    machine, file = here("11.4.0.106"), tmp_path / "report.json"
    monkeypatch.setattr(selftest, "SMALL", (ONE_EACH[0], ONE_EACH[2]))
    text = shell("selftest", "--plugins", "all", "--small", "--report", file)
    assert f"report: {file}" in text
    report = json.loads(file.read_text())
    assert report["kind"] == "selftest"
    assert report["target"] == "tensorrt@11.4.0.106/sm_90"
    assert report["device"]["machine"]
    assert report["date"].endswith("+00:00")
    assert [row["op"] for row in report["plugins"]] == ["MSDeformAttn", "RotaryAttention"]
    for row in report["plugins"]:
        for kind in ("plugin", "body"):
            found = row[kind]
            assert found["right"], row
            assert 0 < found["difference"] < 1e-2
            assert min(found["ms"], found["build_s"], found["plan_bytes"]) > 0
            assert {layer["name"] for layer in found["layers"]} == {"_gemm_myl0_1", "_mha_myl0_2"}
        assert row["gain"] == pytest.approx(1 - row["plugin"]["ms"] / row["body"]["ms"], abs=1e-4)
        assert row["site"] in text
    assert choice.measured(machine.target) == {}  # small shapes tell nothing of presets
    assert machine.world.live == 0


def test_before_10_13_the_library_is_tried(
    here: Any,
    monkeypatch: pytest.MonkeyPatch,
    shell: Shell,  # noqa: F811
    tmp_path: Path,
) -> None:
    machine, file = here("10.3.0"), tmp_path / "report.json"
    words = ("selftest", "--plugins", "MSDeformAttn", "--report", file)
    monkeypatch.setattr(selftest, "SITES", ONE_EACH[:1])
    shell(*words, code=1)
    assert "not right here: plugin of small deformable attention: TensorRT before" in shell.errors
    (row,) = json.loads(file.read_text())["plugins"]  # written all the same
    assert plugins.make_command(machine.target) in row["plugin"]["hint"]
    assert row["body"]["right"]
    assert choice.measured(machine.target) == {}

    library(machine.target)
    shell(*words)
    (row,) = json.loads(file.read_text())["plugins"]
    kept = choice.measured(machine.target)
    assert kept == {"MSDeformAttn": (row["plugin"]["ms"], row["body"]["ms"])}


def test_a_wrong_plugin_is_told(here: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = here("10.16.1.11")
    monkeypatch.setattr(selftest, "SITES", ONE_EACH[1:2])
    monkeypatch.setitem(check.TOLERANCE, "fp16", 1e-9)
    found = selftest.of_plugins(["LayerMerge"], probe.written, lambda _: None)
    assert not selftest.right(found["plugins"][0])
    assert choice.measured(machine.target) == {}


def test_without_a_card_it_says_what_is_missing(
    shell: Shell,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(selftest, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    shell("selftest", "--plugins", "all", code=1)
    for words in (
        "fused plugins cannot be tried on this machine",
        "there is no NVIDIA card",
        "cuda-core is not installed (pip install 'edgevlm[kernels]')",
        "TensorRT is not installed",
    ):
        assert words in shell.errors
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TargetMismatch):
        selftest.of_plugins(OPS, probe.written, lambda _: None)
    shell("selftest", code=1)
    assert "selftest has nothing to try" in shell.errors
    shell("selftest", "--plugins", "SwiGLU", code=1)
    assert "there is no such plugin" in shell.errors


def test_an_engine_is_replayed_and_timed(
    shell: Shell,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    engine_of(HERE / "goldens/e2e_llava15/llava-v1.5-tiny", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selftest, "_BATCHES", 1)
    found = shell.json("selftest", tmp_path / "engine-cpu")
    (file,) = tmp_path.glob("edgevlm-selftest-*.json")
    assert json.loads(file.read_text()) == found
    parts = found["engine"]["components"]
    assert [part["name"] for part in parts] == ["encoder.clip", "merger", "lm"]
    for part in parts:
        assert part["right"]
        assert 0 <= part["difference"] <= part["allowed"]
        assert part["calls"]
        assert all(call["ms"] > 0 for call in part["calls"])
        assert part["open_ms"] > 0
    monkeypatch.setattr(check, "TOLERANCE", {"fp32": -1.0})
    text = shell("selftest", tmp_path / "engine-cpu", code=1)
    assert "encoder.clip differs from the reference" in shell.errors
    assert text == ""


def test_kernels_alone_need_triton_and_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "find_spec", lambda name: None)
    assert selftest._kernels(ONE_EACH, 0) == {
        "error": "Triton is not installed",
        "hint": "pip install 'edgevlm[kernels]'",
    }
    monkeypatch.setattr(selftest, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert "cuda-core" in selftest._kernels(ONE_EACH, 0)["error"]
