"""calibrate, of vision towers by themselves: from images to bundles whose engines embed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import api
from edgevlm.calibration import pieces, unfinished
from edgevlm.calibration.chain import Passage, in_numpy
from edgevlm.calibration.pictures import Sample
from edgevlm.calibration.towers.calibrate import TowerCalibration
from edgevlm.calibration.towers.chain import FEATURES, TowerChain
from edgevlm.calibration.towers.rounds import linears_of_blocks, plan_in_4_bits
from edgevlm.engines import manifest as manifests
from edgevlm.engines.runtime.embedding import Embedder
from edgevlm.export.write import write_bundle
from edgevlm.toolkit import models
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import random_tower
from edgevlm.toolkit.errors import CalibrationError, ConfigError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.vlm.components import EMBEDDING, components
from edgevlm.toolkit.vlm.cost import image_axes
from edgevlm.toolkit.vlm.towers import TowerConfig
from tests.calibration.test_static import draw
from tests.pipeline import silent
from tests.refusals import edgevlm
from tests.towers.test_alone import tiny

KINDS = ("unicom", "dinov2", "convnext")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn") / "images", 12)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny towers with random weights."""
    work, found = tmp_path_factory.mktemp("towers"), {}
    for kind in (*KINDS, "clip", "siglip"):
        source = random_tower(tiny(kind), 3, kind)
        write_bundle(source, work / kind, made_by="tests", progress=silent)
        found[kind] = work / kind
    return found


def calibrated(bundle: Path, out: Path, **given: Any) -> TowerCalibration:
    found = api.calibrate(bundle, out, **given)
    assert isinstance(found, TowerCalibration)
    return found


def held_out(images: Path) -> list[Path]:
    """Every fourth, as calibration holds them out."""
    return sorted(images.iterdir())[3::4]


def embeddings(bundle: Path, work: Path, files: list[Path], loss: float | None = None) -> Array:
    """Of the engine that a bundle becomes."""
    api.build_engine(bundle, work, accept_loss=loss)
    with Embedder.open(work) as tower:
        return np.stack([one.vector for one in tower.embed(files) if one.vector is not None])


def cosines(a: Array, b: Array) -> Array:
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return np.asarray((a * b).sum(1))


@pytest.mark.parametrize("kind", KINDS)
def test_static_int8_of_a_tower_embeds_as_the_report_says(
    kind: str, bundles: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    options = {"images": images, "to": "int8-static", "smooth": 0.5, "bias_correction": True}
    found = calibrated(bundles[kind], tmp_path / "q", **options)
    files = held_out(images)
    plain = embeddings(bundles[kind], tmp_path / "plain", files)
    near = cosines(plain, embeddings(tmp_path / "q", tmp_path / "engine", files))
    loss = manifests.read(tmp_path / "engine").build.precision_losses
    assert max(loss.values()) < 0.1  # on a drawn picture: on random pixels it may be 0.3
    assert found.cosine > 0.99
    assert found.lowest_cosine <= found.cosine
    assert found.held_out == len(files)
    assert near.mean() == pytest.approx(found.cosine, abs=1e-3)
    assert near.min() == pytest.approx(found.lowest_cosine, abs=2e-3)
    assert 0 < found.features_rms < 0.3
    assert found.smoothed > 0
    assert found.corrected > 0
    manifest = Bundle.open(tmp_path / "q").manifest
    (record,) = manifest.components
    before = Bundle.open(bundles[kind]).manifest.files[record.weights].nbytes
    assert manifest.files[record.weights].nbytes < 0.5 * before
    assert manifest.plan.samples == 9
    assert {layer.path for layer in found.layers} == manifest.plan.ranges.keys()
    if kind == "convnext":
        assert any("depthwise" in path for path in manifest.plan.ranges)
    if kind == "unicom":
        assert "encoder.unicom/head.0" in manifest.plan.ranges


def test_weights_in_8_bits_have_inputs_by_rows(
    bundles: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    found = calibrated(bundles["unicom"], tmp_path / "q", images=images, to="int8")
    files = held_out(images)
    plain = embeddings(bundles["unicom"], tmp_path / "plain", files)
    near = cosines(plain, embeddings(tmp_path / "q", tmp_path / "engine", files))
    assert found.cosine > 0.999
    assert near.mean() == pytest.approx(found.cosine, abs=1e-4)
    assert found.smoothed == 4  # two norms of each of two blocks
    assert found.share > 0.5
    assert Bundle.open(tmp_path / "q").manifest.plan.precisions == {"int8_rows"}
    api.build_engine(tmp_path / "q", tmp_path / "reference", target="reference")
    with Embedder.open(tmp_path / "reference") as tower:
        exact = np.stack([one.vector for one in tower.embed(files) if one.vector is not None])
    assert cosines(plain, exact).mean() == pytest.approx(found.cosine, abs=1e-4)


@pytest.mark.parametrize("kind", ["convnext", "siglip"])
def test_blocks_in_4_bits(
    kind: str, bundles: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    """awq+gptq loses less than rounding to nearest, and the engine has what the report says."""
    given = {"images": images, "to": "int4", "budget": 1.0}
    nearest = calibrated(bundles[kind], tmp_path / "rtn", method="rtn", **given)
    found = calibrated(bundles[kind], tmp_path / "q", **given)
    assert nearest.cosine < found.cosine < 1
    assert found.share_4_bits == 1
    assert {one.bits for one in found.rounded} == {4}
    files = held_out(images)
    plain = embeddings(bundles[kind], tmp_path / "plain", files)
    near = cosines(plain, embeddings(tmp_path / "q", tmp_path / "engine", files, loss=1.0))
    assert near.mean() == pytest.approx(found.cosine, abs=2e-3)
    part = components(tiny(kind))[0]
    every = linears_of_blocks(part, image_axes(tiny(kind), 1, 1))
    plan = Bundle.open(tmp_path / "q").manifest.plan
    assert {path for path in every.values() if plan.at(path) == "int4_weights"} == {
        one.path for one in found.rounded
    }
    assert all(plan_in_4_bits(tiny(kind)).at(path) == "int4_weights" for path in every.values())


def test_a_budget_keeps_the_worst(bundles: dict[str, Path], images: Path, tmp_path: Path) -> None:
    given = {"images": images, "to": "int4", "method": "rtn"}
    loose = calibrated(bundles["clip"], tmp_path / "loose", budget=1.0, **given)
    tight = calibrated(bundles["clip"], tmp_path / "tight", budget=1e-6, **given)
    assert tight.cosine > loose.cosine
    assert not tight.within_budget
    assert 0.6 < tight.share_4_bits < 1
    worst = max(tight.rounded, key=lambda one: one.error_4_bits)
    assert worst.bits == 8
    options = {"images": images, "to": "int8-static", "range": "minmax"}
    whole = calibrated(bundles["clip"], tmp_path / "whole", **options)
    mixed = calibrated(bundles["clip"], tmp_path / "mixed", budget=1e-7, **options)
    spared = [layer for layer in mixed.layers if layer.in_float]
    assert spared
    assert mixed.cosine > whole.cosine
    kept = calibrated(
        bundles["clip"], tmp_path / "kept", keep_float=("encoder.clip/layers.0/*",), **options
    )
    assert len(kept.layers) == len(whole.layers) - 6


def test_a_large_weight_is_rounded_and_multiplied_in_pieces(
    bundles: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As UNICOM's head, which is never a tensor whole."""
    whole = {
        to: calibrated(bundles["unicom"], tmp_path / to, images=images, to=to)
        for to in ("int8-static", "int8")
    }
    monkeypatch.setattr(pieces, "LARGEST", 64)
    monkeypatch.setattr(pieces, "_AT_A_TIME", 7 * 32)
    for to, before in whole.items():
        found = calibrated(bundles["unicom"], tmp_path / f"{to} again", images=images, to=to)
        assert found.cosine == pytest.approx(before.cosine, abs=1e-6)
        assert found.relative_rms == pytest.approx(before.relative_rms, rel=0.02)
        for one, other in zip(found.layers, before.layers, strict=True):
            assert one.path == other.path
            assert one.range == pytest.approx(other.range, rel=1e-4)


@pytest.mark.parametrize(("to", "after"), [("int4", 9), ("int8-static", 3)])
def test_an_interrupted_one_goes_on(
    to: str, after: int, bundles: dict[str, Path], images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(unfinished, "_SECONDS", 0.0)
    told: list[str] = []

    def interrupt(message: str) -> None:
        told.append(message)
        if len(told) == after:
            raise KeyboardInterrupt

    calibrated(bundles["convnext"], tmp_path / "whole", images=images, to=to)
    with pytest.raises(KeyboardInterrupt):
        api.calibrate(bundles["convnext"], tmp_path / "q", images=images, to=to, progress=interrupt)
    assert not (tmp_path / "q").exists()
    again: list[str] = []
    api.calibrate(bundles["convnext"], tmp_path / "q", images=images, to=to, progress=again.append)
    assert "going on where an earlier run" in again[0]
    weights = "encoder.convnext.safetensors"
    assert (tmp_path / "q" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_chain_gives_the_embedding_and_the_last_block(
    bundles: dict[str, Path], images: Path
) -> None:
    bundle = Bundle.open(bundles["dinov2"])
    model = bundle.model
    assert isinstance(model, TowerConfig)
    chain, name = TowerChain(model), bundle.manifest.components[0].name
    by = Passage({name: bundle.tensors(name)}, in_numpy())
    files = held_out(images)
    found = chain.run_all([Sample(file) for file in files], by)
    for one, file in zip(found, files, strict=True):
        (alone,) = chain.run_all([Sample(file)], by)
        np.testing.assert_allclose(one[name][EMBEDDING], alone[name][EMBEDDING], atol=1e-5)
        assert one[FEATURES][FEATURES].shape[-1] == model.encoder.config.hidden_size
    config, tensors = model.encoder.config, bundle.tensors(name)
    pixels = chain.pixels(Sample(files[0]))[None]
    (features,) = models.encoder("dinov2").forward(
        by.arithmetic.ops, type(config)(**{**vars(config), "taps": (config.num_layers,)}),
        _weights(tensors), pixels,
    )  # fmt: skip
    np.testing.assert_allclose(found[0][FEATURES][FEATURES][:, -features.shape[1] :], features,
                               atol=1e-5)  # fmt: skip


def _weights(tensors: Any) -> Any:
    from edgevlm.toolkit.ops.vocabulary import Weights

    return Weights(tensors)


REFUSED = {
    "no images": ((), "is calibrated with images"),
    "text": (("--text", __file__, "--images", "IMAGES"), "--text"),
    "prompts": (("--prompts", __file__, "--images", "IMAGES"), "--prompts"),
    "ranges of weights alone": (("--to", "int8", "--range", "minmax", "--images", "IMAGES"),
                                "--range has no meaning"),
    "4 bits in 8": (("--to", "int8", "--method", "rtn", "--images", "IMAGES"), "--method"),
    "smoothing of 4 bits": (("--to", "int4", "--smooth", "0.5", "--images", "IMAGES"), "--smooth"),
    "no such layer": (("--to", "int8", "--keep-float", "lm/*", "--images", "IMAGES"), "lm/*"),
    "no such image": (("--to", "int8", "--images", "nowhere"), "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_tower_cannot_be_calibrated_with(
    case: str, bundles: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    words, named = REFUSED[case]
    given = [images if word == "IMAGES" else word for word in words]
    ran = edgevlm("calibrate", bundles["clip"], tmp_path / "q", *given)
    assert ran.code == 1
    assert named in ran.err
    assert not (tmp_path / "q").exists()


def test_the_command_line_reports_and_times(
    bundles: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    words = (
        "--images",
        images,
        "--to",
        "int8-static",
        "--measure",
        "--report",
        tmp_path / "r.json",
    )
    ran = edgevlm("calibrate", bundles["clip"], tmp_path / "q", *words)
    assert ran.code == 0, ran.err
    assert "embedding" in ran.out
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["kind"] == "calibration"
    assert data["embedding"]["cosine"] > 0.99
    assert data["features"]["relative_rms"] > 0
    assert [row["call"] for row in data["latency"]] == ["view"]
    assert data["layers"][0]["error"] >= data["layers"][-1]["error"]
    again = edgevlm("calibrate", tmp_path / "q", tmp_path / "qq", "--images", images)
    assert again.code == 1
    assert "is quantized already" in again.err


def test_few_and_broken_images_are_named(bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="has 3 samples"):
        api.calibrate(bundles["clip"], tmp_path / "q", images=draw(tmp_path / "few", 3), to="int8")
    with pytest.raises(ConfigError, match="is unknown"):
        api.calibrate(bundles["clip"], tmp_path / "q", images=tmp_path / "few", to="int3")
