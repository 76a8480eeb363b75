"""FP8 bundles through every release that may have a card for them, from calibrate to answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm import api
from edgevlm.engines.backends import tensorrt as backend
from edgevlm.engines.backends.tensorrt.kernels import Kernel, products
from edgevlm.engines.build.check import TOLERANCE
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.errors import UnsupportedError
from tests.calibration.test_static import draw
from tests.engines.backends.tensorrt.conftest import GOLDEN
from tests.engines.backends.tensorrt.machine import installed

CARDS = {
    "10.13.3.9": "sm_110",
    "10.16.1.11": "sm_110",
    "11.4.0.106": "sm_90",
    "rtx-1.7.1.116": "sm_120",
}
QUESTION = "What is in the image?"


@pytest.fixture(scope="module")
def in_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("fp8")
    images = draw(work / "images", 6)
    api.export_bundle(GOLDEN / "llava-v1.5-tiny", work / "bundle", dtype="fp32")
    api.calibrate(work / "bundle", work / "q", images=images, to="fp8")
    return work


def answered(engine: Path, images: Path) -> list[int]:
    with Session.open(engine) as session:
        return list(session.answer(Question(QUESTION, [images / "00.png"], 6)).token_ids)


@pytest.mark.parametrize("release", CARDS)
def test_engines_answer_as_the_reference_does(
    release: str, in_fp8: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine = installed(release, monkeypatch, tmp_path / "packages", card=CARDS[release])
    made = api.build_engine(in_fp8 / "q", tmp_path / "e", target=str(machine.target))
    assert made.verified
    assert max(made.build.kernel_differences.values()) < 1e-2 < TOLERANCE["fp8"]
    assert all(plan.rounded for plan in made.plans.values())
    reference = in_fp8 / "reference"
    if not reference.exists():
        api.build_engine(in_fp8 / "q", reference, target="reference")
    images = in_fp8 / "images"
    assert answered(tmp_path / "e", images) == answered(reference, images)


def test_codes_lie_beside_a_plan_without_weights(
    in_fp8: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine = installed("11.4.0.106", monkeypatch, tmp_path / "packages")
    made = api.build_engine(
        in_fp8 / "q", tmp_path / "e", target=str(machine.target), strip_weights=True
    )
    assert made.verified
    for part in made.components:
        stored = SafetensorsFile(tmp_path / "e" / part.weights)
        assert "fp8" in {entry.dtype for entry in stored.entries.values()}


def test_a_card_without_fp8_refuses_it(
    in_fp8: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = installed("10.16.1.11", monkeypatch, tmp_path / "packages")
    with pytest.raises(UnsupportedError, match="FP8 does not exist on sm_87") as caught:
        api.build_engine(in_fp8 / "q", tmp_path / "e", target=str(machine.target))
    assert "--to int8-static" in caught.value.hint
    assert not (tmp_path / "e").exists()


def test_what_the_builder_made_floats_of_is_told() -> None:
    kernels = [
        Kernel("a", "gemm", ("q", "k"), ("FP8", "Half")),
        Kernel("b", "gemm", ("down",), ("Half",)),
        Kernel("a", "gemm", ("q", "k"), ("FP8", "Half")),
        Kernel("c", "gemm", ("up",), ("FP8", "Half")),
    ]
    sites = {"q": "FP8", "k": "FP8", "down": "FP8", "up": "FP8"}
    assert products(kernels, sites, 1) == ["q", "k", "up"]
    assert products(kernels, sites, 2) == ["q", "k"]  # the other profile has none of up

    (whole,) = backend._rounded(sites, list(sites))
    assert whole == "all 4 products of inputs in FP8 are computed in it"
    (part,) = backend._rounded(sites, ["q", "k"])
    assert "made floats of 2 of 4 products of inputs in FP8 (down)" in part
    assert backend._rounded({}, []) == []
