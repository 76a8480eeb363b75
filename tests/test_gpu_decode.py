"""benchmarks/gpu_decode.py on the processor: its parts are what runs on a card."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from benchmarks import common, gpu_decode
from benchmarks.gpu_decode import Limits
from edgevlm import cli
from edgevlm.engines.backends import cuda_probes, onnxruntime_cuda
from edgevlm.engines.build.build import Request, build
from edgevlm.toolkit.target import this_cpu
from tests.engines.backends.test_onnxruntime_cuda import (
    CARD,
    PROCESSOR,
    TELLS,
    bundle_of,
    requantized,
)
from tests.pipeline import silent

pytestmark = pytest.mark.skipif(not TELLS, reason="the backend needs ONNX Runtime 1.24")
LIMITS = Limits(10.0, 0.1, 0.1, "the test")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `build_all` makes, of a tiny model."""
    work = tmp_path_factory.mktemp("engines")
    bundle = bundle_of(work / "bundle", "fp16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime_cuda, "PROVIDER", PROCESSOR)
        patch.setattr(onnxruntime_cuda, "here", lambda: CARD)
        requests = {
            "fp16": Request(CARD, None, False, "tests"),
            "int4": requantized(bundle, "int4-blocks", "fp16"),
            "processor": Request(this_cpu(), None, False, "tests"),
        }
        for name, request in requests.items():
            build(bundle, work / name, request, silent)
    return {name: work / name for name in requests}


@pytest.fixture(autouse=True)
def on_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's backend over the processor's provider, its probes small."""
    monkeypatch.setattr(onnxruntime_cuda, "PROVIDER", PROCESSOR)
    monkeypatch.setattr(onnxruntime_cuda, "here", lambda: CARD)
    small = cuda_probes.measure
    monkeypatch.setattr(cuda_probes, "measure", lambda f, p: small(f, p, (8, 16, 32)))


def test_the_limits_of_a_device(engines: dict[str, Path]) -> None:
    for found in (
        gpu_decode.limits_by_torch("cpu", megabytes=1, width=32),
        gpu_decode.limits_by_onnxruntime(engines["fp16"]),
    ):
        assert min(found.gb_s, found.fp16_tflop_s, found.bf16_tflop_s) > 0


def test_tokens_of_two_engines_agree(engines: dict[str, Path]) -> None:
    found = gpu_decode.agreement(engines["fp16"], engines["processor"], 8)
    assert found["same_tokens"] >= 0.75
    assert 0 < found["logits_rms"] < 2e-2
    itself = gpu_decode.agreement(engines["processor"], engines["processor"], 4)
    assert itself == {"same_tokens": 1.0, "logits_rms": 0.0}


def test_speed_is_a_share_of_the_limits(engines: dict[str, Path]) -> None:
    found = gpu_decode.speed(engines["fp16"], LIMITS, runs=1, tokens=4)
    assert set(found["reached"]) == {"encoder.clip", "merger", "prefill", "decode"}
    assert found["tokens_per_s"] > 0
    assert set(found["limited_by"].values()) <= {"arithmetic", "memory"}


def test_the_share_of_a_limit() -> None:
    limits = Limits(1000.0, 100.0, 100.0, "the test")
    assert gpu_decode.share(1.0, 14.0, 20.0, limits) == (0.7, "memory")  # 14 GB at 1 TB/s
    assert gpu_decode.share(1000.0, 1.0, 20.0, limits) == (0.5, "arithmetic")


def test_the_whole_benchmark(
    engines: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_decode, "build_all", lambda *_: engines)
    monkeypatch.setattr(gpu_decode, "limits_by_torch", lambda: LIMITS)
    monkeypatch.setattr(gpu_decode, "TOKENS", 4)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    gpu_decode.main(["--save", "--work", str(tmp_path / "work")])
    assert "tokens as on the processor" in capsys.readouterr().out
    saved = json.loads((tmp_path / "gpu_decode.json").read_text())
    assert {"fp16", "int4", "limits", "card", "preset"} <= set(saved["measured"])
    assert saved["measured"]["card"]["name"] is None
    assert [bar["what"] for bar in saved["bars"]] == [
        "tokens as on the processor",
        "decode, of the memory rate",
        "encoder, of the matrix rate",
    ]
    assert saved["notes"] == []
    assert saved["date"]


def test_what_fails_is_noted_and_the_rest_goes_on(
    engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise SystemExit("edgevlm build failed:\nno card")

    result = gpu_decode.report()
    monkeypatch.setattr(gpu_decode, "limits_by_torch", broken)
    monkeypatch.setattr(gpu_decode, "TOKENS", 2)
    whole = dict(engines)
    del whole["int4"]
    monkeypatch.setattr(gpu_decode, "build_all", lambda *_: whole)
    gpu_decode.measure("tiny", tmp_path, result)
    assert [note.split(" failed")[0] for note in result.notes] == [
        "measuring the card with torch",
        "timing int4",
    ]
    assert result.measured["limits"]["by"] == "ONNX Runtime"
    assert "fp16" in result.measured
    monkeypatch.setattr(gpu_decode, "build_all", broken)
    nothing = gpu_decode.report()
    gpu_decode.measure("tiny", tmp_path, nothing)
    assert nothing.notes[0] == "building failed: SystemExit: edgevlm build failed: no card"
    assert nothing.bars == []


def test_what_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(gpu_decode, "edgevlm", lambda *words: asked.append([*map(str, words)]))
    engines = gpu_decode.build_all("llava-qwen2-0.5b", tmp_path)
    assert set(engines) == {"fp16", "int4", "processor"}
    assert asked[0][:3] == ["export", "preset:llava-qwen2-0.5b", str(tmp_path / "bundle")]
    targets = {words[2].rpartition("/")[2]: words[4] for words in asked[1:]}
    assert targets == {"fp16": "cuda", "int4": "cuda", "processor": "cpu"}
    for words in asked:
        known = cli.app.registered_commands
        verb = next(c.callback for c in known if c.callback and c.callback.__name__ == words[0])
        options = {w.removeprefix("--").replace("-", "_") for w in words if w.startswith("--")}
        assert options <= set(inspect.signature(verb).parameters)
