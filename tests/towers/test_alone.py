"""Towers by themselves against the installed transformers: folder -> bundle -> engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from edgevlm import api
from edgevlm.engines.build.build import lint
from edgevlm.engines.runtime.embedding import Embedder
from edgevlm.export.write import graphs
from edgevlm.toolkit import models, systems
from edgevlm.toolkit.checkpoints.layouts.source import Options, random_tower
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.target import parse
from edgevlm.toolkit.vlm import components, towers
from edgevlm.toolkit.vlm.config import ComponentConfig
from edgevlm.toolkit.vlm.presets import clip_pixels, unicom_pixels
from edgevlm.toolkit.vlm.tower_presets import PRESETS
from edgevlm.toolkit.vlm.towers import TowerConfig
from edgevlm.training.torch_files import TorchFile
from edgevlm.training.towers.tower import KINDS
from tests.calibration.test_static import draw
from tests.conftest import ROOT, golden_case
from tests.systems.test_huggingface import scatter
from tests.towers.alone import embedded, engine_of, near, state_dict
from tests.towers.test_native_mlcd import native

hf: Any = transformers
BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 7}
VIT = BASE | {"intermediate_size": 72, "image_size": 28}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 30}  # fmt: skip
EDGE = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}


def pooled(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the class itself calls the pooled output."""
    found: torch.Tensor = model(pixel_values=pixels).pooler_output
    return found


def of_whole(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return pooled(model.vision_model, pixels)


def both(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What Dinov2ForImageClassification's classifier reads."""
    tokens = model(pixel_values=pixels).last_hidden_state
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


def patches(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = model(pixel_values=pixels).last_hidden_state
    return tokens.mean(1)


Case = tuple[Callable[[], Any], Callable[[], Any], Callable[[Any, Any], Any], str | None]
CASES: dict[str, Case] = {
    "clip": (
        lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT)),
        lambda: hf.CLIPImageProcessorPil(**EDGE),
        pooled,
        None,
    ),
    "clip with its text model": (
        lambda: hf.CLIPModel(
            hf.CLIPConfig(vision_config=VIT | {"hidden_act": "gelu"}, text_config=TEXT)
        ),
        lambda: hf.CLIPImageProcessorPil(**EDGE),
        of_whole,
        None,
    ),
    "siglip": (
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT)),
        lambda: hf.SiglipImageProcessorPil(size={"height": 28, "width": 28}),
        pooled,
        None,
    ),
    "siglip without its head": (
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT, vision_use_head=False)),
        lambda: hf.SiglipImageProcessorPil(size={"height": 28, "width": 28}),
        patches,
        None,
    ),
    "mlcd": (
        lambda: hf.MLCDVisionModel(hf.MLCDVisionConfig(**VIT)),
        lambda: hf.CLIPImageProcessorPil(**EDGE),
        pooled,
        None,
    ),
    "dinov2, other images": (
        lambda: hf.Dinov2Model(hf.Dinov2Config(**BASE, image_size=42)),
        lambda: hf.BitImageProcessorPil(**EDGE),
        pooled,
        None,
    ),
    "dinov2, registers, both": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**BASE, image_size=28)),
        lambda: hf.BitImageProcessorPil(**EDGE),
        lambda model, pixels: both_of_registers(model, pixels),
        "class+mean",
    ),
    "dinov2, both": (
        lambda: hf.Dinov2Model(hf.Dinov2Config(**BASE, image_size=28)),
        lambda: hf.BitImageProcessorPil(**EDGE),
        both,
        "class+mean",
    ),
    "convnext": (
        lambda: hf.ConvNextModel(
            hf.ConvNextConfig(
                depths=[1, 2, 1],
                hidden_sizes=[8, 16, 24],
                num_stages=3,
                layer_norm_eps=1e-3,
            )
        ),
        lambda: hf.ConvNextImageProcessorPil(size={"shortest_edge": 48}, crop_pct=0.875),
        pooled,
        None,
    ),
}


def both_of_registers(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    tokens = model(pixel_values=pixels).last_hidden_state
    start = 1 + model.config.num_register_tokens
    return torch.cat([tokens[:, 0], tokens[:, start:].mean(1)], 1)


def saved(name: str, folder: Path) -> tuple[Any, Any]:
    """A random tower of transformers in `folder`, and its processor."""
    torch.manual_seed(4)
    model = CASES[name][0]().eval()
    scatter(model)
    model.save_pretrained(folder)
    processor = CASES[name][1]()
    processor.save_pretrained(folder)
    return model, processor


def photographs(folder: Path, generator: np.random.Generator) -> list[Path]:
    files = [folder / f"{i}.png" for i in range(3)]
    for file, size in zip(files, ((61, 50), (45, 64), (50, 50)), strict=True):
        small = Image.fromarray(generator.integers(0, 256, (9, 8, 3), np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(file)
    return files


@pytest.mark.parametrize("name", CASES)
def test_a_folder_gives_the_embeddings_of_transformers(
    name: str, tmp_path: Path, generator: np.random.Generator
) -> None:
    model, processor = saved(name, tmp_path / "tower")
    files = photographs(tmp_path, generator)
    images = [Image.open(file) for file in files]
    expected = processor(images=images, return_tensors="np")["pixel_values"]
    engine = engine_of(tmp_path / "tower", tmp_path, pooling=CASES[name][3])
    with Embedder.open(engine) as tower:
        pixels = np.stack([tower.pixels(file) for file in files])
    assert np.array_equal(pixels, expected)
    with torch.no_grad():
        answer = CASES[name][2](model, torch.from_numpy(pixels)).numpy()
    near(embedded(engine, files), answer)


@pytest.mark.parametrize("file", ["weights.safetensors", "weights_deploy.safetensors"])
def test_unireplknet_from_its_file(file: str, tmp_path: Path) -> None:
    """The mean of the features, behind the norm that the open file holds and the merged lacks."""
    golden = golden_case("unireplknet5")
    for name in (file, "preprocessor_config.json"):
        (tmp_path / name).write_bytes((golden / name).read_bytes())
    bundle = api.export_bundle(tmp_path / file, tmp_path / "bundle")
    part = components.components(bundle.model)[0]
    tensors = bundle.tensors(part.name)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 192, 192)).astype(np.float32)
    (found,) = part.forward(NumpyOps(), Weights(tensors), {"pixels": pixels}).values()
    encoder = bundle.model.encoders[0]
    features = models.encoder("unireplknet").forward(
        NumpyOps(), encoder.config, Weights(tensors), pixels
    )[0]
    mean = features.mean(1)
    if "deploy" in file:
        assert isinstance(bundle.model, TowerConfig)
        assert bundle.model.pooling == "plain-mean"
        near(found, mean)
        return
    centred = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    norm = api.open_source(tmp_path / file, api.read_options()).weights[part.name]
    near(found, centred * norm["norm_post.weight"] + norm["norm_post.bias"])


def test_folders_that_are_almost_a_tower_are_refused(tmp_path: Path) -> None:
    saved("clip", tmp_path / "tower")
    path = tmp_path / "tower/preprocessor_config.json"
    text = path.read_text()
    path.write_text(text.replace("28", "42"))
    with pytest.raises(ConfigError, match=r"images of \(42, 42\), the tower takes \(28, 28\)"):
        api.export_bundle(tmp_path / "tower", tmp_path / "bundle")
    path.write_text(text)
    config = json.loads((tmp_path / "tower/config.json").read_text())
    (tmp_path / "tower/config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="16 missing"):
        api.export_bundle(tmp_path / "tower", tmp_path / "bundle")
    (tmp_path / "tower/config.json").write_text(json.dumps(config | {"patch_size": 14}))
    with pytest.raises(CheckpointError, match="mis-shaped"):
        api.export_bundle(tmp_path / "tower", tmp_path / "bundle")
    (tmp_path / "tower/config.json").write_text(json.dumps(config))
    path.unlink()
    with pytest.raises(ConfigError, match=r"preprocessor_config.json does not exist"):
        api.export_bundle(tmp_path / "tower", tmp_path / "bundle")
    path.write_text(text)
    with pytest.raises(ConfigError, match="--heads 4 is for weight files"):
        api.export_bundle(tmp_path / "tower", tmp_path / "bundle", heads=4)
    with pytest.raises(ConfigError, match="is a vision tower by itself"):
        api.train("llava-finetune", str(tmp_path / "tower"), tmp_path / "out", data=["none"])


def tiny(kind: str) -> TowerConfig:
    """The encoder file's own small instance, seeing images of the size that it takes."""
    config = models.encoder(kind).tiny()
    square = config.pixels[0] if isinstance(config.pixels[0], int) else 64
    if kind == "mlcd":
        config = type(config)(**{**vars(config), "image_size": (square, square)})
    rule = unicom_pixels(square) if kind == "unicom" else clip_pixels(square)
    pooling = models.tower(kind).POOLINGS[0]
    return TowerConfig(
        kind, kind, ComponentConfig(kind, kind, config), pooling, ImageRules({kind: rule})
    )


def original(kind: str, work: Path) -> None:
    """Read a tower's own weight file."""
    golden = golden_case("unireplknet5")
    files = {"unicom": work / "ViT.pt", "unireplknet": golden / "weights.safetensors",
             "mlcd": work / "MLCD.pt"}  # fmt: skip
    if kind == "unicom":
        torch.save(state_dict(48, 1, 7, 2, 20, seed=1), files[kind])
    if kind == "mlcd":
        native(56, work, load_file(golden_case("mlcd_vit_rope2d") / "native.safetensors"))
    source = systems.load_any(files[kind], Options(torch_reader=TorchFile, heads=HEADS.get(kind)))
    assert source.model.system == kind


def published(kind: str, work: Path) -> None:
    """Read a tower's folder of transformers."""
    saved(next(name for name in CASES if name.startswith(kind)), work / "published")
    assert systems.load_any(work / "published", Options()).model.system == kind


HEADS = {"unicom": 4}


def tried(action: Callable[[], None]) -> bool:
    """Whether there is such a layout."""
    try:
        action()
    except (KeyError, StopIteration):
        return False
    return True


def row_of(kind: str) -> tuple[str, ...]:
    """A line of the page's table of towers."""
    text = (ROOT / "docs/systems.md").read_text()
    table = text[text.index("| tower | loads original") :].split("\n\n")[0]
    rows = [tuple(c.strip() for c in line.strip("|").split("|")) for line in table.splitlines()]
    return next(row for row in rows if row[0] == kind)


@pytest.mark.parametrize("kind", models.towers())
def test_every_tower_lowers_everywhere_and_builds_in_int8(kind: str, tmp_path: Path) -> None:
    from edgevlm.export.write import write_bundle

    source = random_tower(tiny(kind), 0, kind)
    recorded = graphs(source)
    loads = (tried(lambda: original(kind, tmp_path)), tried(lambda: published(kind, tmp_path)))
    trains = kind in KINDS
    # what follows fails where one is not true
    cells = (*loads, True, True, trains, True, True, True, True)
    assert row_of(kind) == (kind, *("yes" if cell else "-" for cell in cells))
    for target in ("jetson-agx-orin", "tensorrt-rtx@1.7/sm_89", "onnxruntime-cuda@1.31.1/sm_89"):
        assert lint(recorded, parse(target))
    write_bundle(source, tmp_path / "bundle", made_by="tests", progress=lambda line: None)
    engine = api.build_engine(
        tmp_path / "bundle", tmp_path / "engine", precision="int8-rows", keep_slower=True
    )
    (loss,) = engine.build.precision_losses.values()
    assert 1e-5 < loss < 0.2
    with Embedder.open(tmp_path / "engine") as tower:
        one, two = np.random.default_rng(1).standard_normal(
            (2, 3, *source.model.pixels), np.float32
        )
        together = tower.run(np.stack([one, two]))
        alone = tower.run(two[None])
        assert together.shape == (2, source.model.channels)
        near(together[1:], alone, 1e-4)  # an image does not see those beside it
    with pytest.raises(ConfigError, match="--precision int4 is for the layers of a language model"):
        api.build_engine(tmp_path / "bundle", tmp_path / "other", precision="int4")
    draw(tmp_path / "images", 4)
    ways: dict[str, Any] = {"int8-static": {}, "int4": {"method": "rtn", "budget": 1.0}}
    for to, options in ways.items():
        out = tmp_path / to
        api.calibrate(tmp_path / "bundle", out, images=tmp_path / "images", to=to, **options)
        assert api.lint(systems.load_any(out, Options()), "fp32", "jetson-agx-orin")
        engine = api.build_engine(out, tmp_path / f"{to}-engine", accept_loss=0.5)
        assert 0 < next(iter(engine.build.precision_losses.values())) < 0.5


def test_int8_is_timed_and_a_tower_says_so(tmp_path: Path) -> None:
    from edgevlm.export.write import write_bundle

    source = random_tower(tiny("clip"), 0, "clip")
    write_bundle(source, tmp_path / "bundle", made_by="tests", progress=lambda line: None)
    engine = api.build_engine(tmp_path / "bundle", tmp_path / "engine", precision="int8")
    assert {trial.component for trial in engine.trials} == {"encoder.clip"}
    assert {trial.call for trial in engine.trials} == {"view"}
    assert engine.prompt_form is None
    assert "--max-context" not in engine.rebuild_command(tmp_path / "engine")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name: str) -> None:
    source = systems.any_preset(name, 0, Options())
    model = source.model
    assert isinstance(model, TowerConfig)
    assert towers.from_json(json.loads(json.dumps(towers.to_json(model))), "test") == model
    (part,) = components.components(model)
    params = sum(int(np.prod(shape)) for shape in part.shapes.values())
    published = {"unicom-b32": 116_723_200, "unicom-b16": 201_967_872, "unicom-l14": 572_328_448,
                 "unicom-l14-336": 908_200_448}  # fmt: skip
    if name in published:  # folded: both norms' four vectors but one bias
        folded = 2 * model.encoder.config.hidden_size + model.channels
        assert params == published[name] - folded
    assert model.channels == part.outputs[0].shape[-1]
    for page in ("docs/towers.md", "docs/systems.md"):
        assert f"`{name}`" in (ROOT / page).read_text()
    with pytest.raises(ConfigError, match="takes no options of models"):
        systems.any_preset(name, 0, Options(max_context=7))


def test_arrays_and_bytes_are_images_too(tmp_path: Path) -> None:
    from edgevlm.export.write import write_bundle

    source = random_tower(tiny("dinov2"), 0, "dinov2")
    write_bundle(source, tmp_path / "bundle", made_by="tests", progress=lambda line: None)
    api.build_engine(tmp_path / "bundle", tmp_path / "engine")
    array = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    given: list[Any] = [array, (tmp_path / "a.png").read_bytes(), tmp_path / "a.png", b"none"]
    with Embedder.open(tmp_path / "engine", batch=3) as tower:
        found = list(tower.embed(given))
    vectors: list[Array] = [one.vector for one in found[:3] if one.vector is not None]
    assert len(vectors) == 3
    assert all(np.array_equal(vectors[0], vector) for vector in vectors)
    assert "is not an image" in found[3].reason
