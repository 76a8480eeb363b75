"""--bisect on TensorRT and on a card: the first op that differs is named, in few builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from edgevlm import api
from edgevlm.engines import backends
from edgevlm.engines.backends import onnxruntime_cuda
from edgevlm.engines.backends.tensorrt import TensorRT
from edgevlm.engines.build import bisect_plans
from edgevlm.engines.build.bisect import Divergence
from edgevlm.engines.build.bisect_plans import Marking, first_divergence
from edgevlm.engines.build.build import Request, build
from edgevlm.engines.lowering import onnxruntime_cuda_rows, tensorrt_rows
from edgevlm.engines.lowering.capabilities import Row
from edgevlm.engines.lowering.graph import Body, Rewriter
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.manifest import GOLDENS, Bundle
from edgevlm.toolkit.errors import AccuracyError
from tests.engines.backends.tensorrt.conftest import GOLDEN
from tests.engines.backends.tensorrt.machine import installed
from tests.engines.backends.test_onnxruntime_cuda import CARD, PROCESSOR, TELLS
from tests.pipeline import silent

NEW = "11.4.0.106"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bisect") / "bundle"
    api.export_bundle(GOLDEN / "llava-v1.5-tiny", out, dtype="fp32")
    return out


def wrong(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """QuickGelu with another slope."""
    b = Body(node.name, r)
    slope = b("CastLike", [b.float32(1.9), node.input[0]], "slope")
    steep = b("Mul", [node.input[0], slope], "steep")
    return b.ending("Mul", [node.input[0], b("Sigmoid", [steep], "gate")], node.output)


def search(bundle: Path, component: str, backend: Any) -> Divergence | None:
    opened = Bundle.open(bundle)
    calls = [g for g in goldens.load(bundle / GOLDENS) if g.component == component]
    record = opened.manifest.component(component)
    marking: Marking = backend
    return first_divergence(opened, record, marking, calls, 1e-3)


def test_the_first_wrong_op_of_a_plan_is_found(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = installed(NEW, monkeypatch, tmp_path / "packages")
    monkeypatch.setitem(
        tensorrt_rows.ROWS, "edgevlm.QuickGelu", Row("swap", "wrong", wrong, "Sigmoid")
    )
    monkeypatch.setattr(bisect_plans, "_MARKED", 8)
    builds = list[int]()
    marked = TensorRT.marked

    def counted(self: TensorRT, *given: Any) -> Any:
        builds.append(len(given[2].graph.output))
        return marked(self, *given)

    monkeypatch.setattr(TensorRT, "marked", counted)
    request = Request(machine.target, None, False, "tests", bisect=True)
    with pytest.raises(AccuracyError, match=r"encoder\.clip differs") as caught:
        build(bundle, tmp_path / "e", request, silent)
    assert "first at encoder.clip/layers.0/mlp/" in caught.value.message
    assert "made by Mul" in caught.value.message
    assert not (tmp_path / "e").exists()
    assert 2 <= len(builds) <= 3
    assert max(builds) <= 8 + 1  # with the component's own
    assert machine.world.live == 0


def test_a_language_model_is_searched_with_its_own_state(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = installed("10.3.0", monkeypatch, tmp_path / "packages")
    assert search(bundle, "lm", backends.backend(machine.target)) is None
    assert machine.world.live == 0


@pytest.mark.skipif(not TELLS, reason="ONNX Runtime before 1.24 tells no node's place")
def test_the_first_wrong_op_on_a_card_is_found(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_cuda, "PROVIDER", PROCESSOR)
    monkeypatch.setattr(onnxruntime_cuda, "here", lambda: CARD)
    row = Row("swap", "wrong", wrong, "Sigmoid")
    monkeypatch.setitem(onnxruntime_cuda_rows.ROWS, "edgevlm.QuickGelu", row)
    for dtype in ("fp32", "fp16"):
        if dtype == "fp16":
            bundle = tmp_path / "half"
            api.export_bundle(GOLDEN / "llava-v1.5-tiny", bundle, dtype=dtype)
        request = Request(CARD, None, False, "tests", bisect=True)
        with pytest.raises(AccuracyError, match=r"encoder\.clip differs") as caught:
            build(bundle, tmp_path / "e", request, silent)
        assert "first at encoder.clip/layers.0/mlp/" in caught.value.message
