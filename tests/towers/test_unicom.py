"""UNICOM by itself, from its .pt files to embeddings: the golden, other sizes, halves, refusals."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from edgevlm import api
from edgevlm.engines.runtime.embedding import Embedder
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts import unicom_file
from edgevlm.toolkit.checkpoints.weights import Checkpoint
from edgevlm.toolkit.errors import CheckpointError, ConfigError, UnsupportedError
from edgevlm.toolkit.models.encoders import unicom
from edgevlm.toolkit.vlm.towers import TowerConfig
from edgevlm.training.torch_files import TorchFile
from tests.towers.alone import (
    embedded,
    embedding,
    engine_of,
    near,
    state_dict,
    unicom_pixels,
)

MODES = ("RGB", "L", "RGBA", "P", "LA", "1", "CMYK")


def pictures(folder: Path, generator: np.random.Generator) -> list[Path]:
    """One of each mode, smooth enough for resampling to matter, with odd pixels to spare."""
    files = []
    for number, mode in enumerate(MODES):
        small = generator.integers(0, 256, (6, 7, 4), np.uint8)
        size = (61 + 2 * number, 50 + 3 * number)
        whole = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        image = whole if mode == "RGBA" else whole.convert("RGB" if mode != "LA" else "LA")
        files.append(folder / f"{number}.{'tif' if mode == 'CMYK' else 'png'}")
        image.convert(mode).save(files[-1])
    return files


@pytest.mark.parametrize("golden", ["unicom_vit"], indirect=True)
def test_the_original_is_reproduced(golden: Path, tmp_path: Path) -> None:
    inputs, outputs = np.load(golden / "inputs.npz"), np.load(golden / "outputs.npz")
    engine = engine_of(golden / "ViT-tiny.pt", tmp_path, heads=4)
    files = [golden / f"image{i}.png" for i in range(6)]
    with Embedder.open(engine) as tower:
        pixels = np.stack([tower.pixels(file) for file in files])
    assert np.array_equal(pixels, inputs["pixel_values"])
    near(embedded(engine, files), outputs["embedding"], 1e-5)


# width, blocks, heads, patch, grid, embedding; how the file stores it, and with which prefix
CASES = [
    ((48, 3, 4, 7, 4, 20), torch.float32, ""),
    ((768, 1, 12, 16, 2, 24), torch.float16, "model."),
    ((32, 2, 2, 5, 3, 40), torch.float16, "module._orig_mod."),
    ((64, 1, 1, 8, 3, 16), torch.bfloat16, "_orig_mod."),
]


@pytest.mark.parametrize(("sizes", "dtype", "prefix"), CASES)
def test_other_sizes_seeds_and_halves(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    prefix: str,
    tmp_path: Path,
    generator: np.random.Generator,
) -> None:
    width, blocks, heads, patch, grid, length = sizes
    state = state_dict(width, blocks, patch, grid, length, seed=width)
    stored = {n: x.to(dtype) if x.is_floating_point() else x for n, x in state.items()}
    torch.save({prefix + name: tensor for name, tensor in stored.items()}, tmp_path / "ViT.pt")
    given = None if width in unicom_file.HEADS else heads
    engine = engine_of(tmp_path / "ViT.pt", tmp_path, heads=given)
    files = pictures(tmp_path, generator)
    side = patch * grid
    expected = np.stack([unicom_pixels(Image.open(file), side) for file in files])
    with Embedder.open(engine) as tower:
        assert np.array_equal(np.stack([tower.pixels(file) for file in files]), expected)
    near(embedded(engine, files, batch=3), embedding(stored, heads, expected))


def test_a_tower_is_told_from_a_model_in_its_manifest(tmp_path: Path) -> None:
    torch.save(state_dict(48, 1, 7, 2, 20, seed=1), tmp_path / "ViT.pt")
    engine = engine_of(tmp_path / "ViT.pt", tmp_path, heads=4)
    bundle = Bundle.open(tmp_path / "bundle")
    assert isinstance(bundle.model, TowerConfig)
    assert bundle.manifest.model["kind"] == "tower"
    assert not (bundle.path / "tokenizer.json").exists()
    assert [c.name for c in bundle.manifest.components] == ["encoder.unicom"]
    with pytest.raises(UnsupportedError, match="has no language model"):
        _ = bundle.vlm
    from edgevlm.engines.runtime.session import Session

    with pytest.raises(UnsupportedError, match="has no language model") as refused:
        Session.open(engine)
    assert "edgevlm embed" in refused.value.hint
    again = api.export_bundle(tmp_path / "bundle", tmp_path / "again", dtype="fp16")
    assert again.model == bundle.model
    api.build_engine(tmp_path / "again", tmp_path / "half")
    data, lines = api.inspect(tmp_path / "half")
    assert data["context"] == 0
    assert "a vision tower by itself" in lines[0]
    with pytest.raises(ConfigError, match="--max-context 7 has no effect"):
        api.build_engine(tmp_path / "bundle", tmp_path / "other", max_context=7)


def test_the_published_heads_are_known(tmp_path: Path) -> None:
    """The head's sizes follow from every published file's shapes; the grid may not contradict."""
    for name, config in unicom.PUBLISHED.items():
        shapes = unicom.stored_shapes(config)

        class Shapes:
            def shape(self, key: str, shapes: dict[str, tuple[int, ...]] = shapes) -> object:
                return shapes[key]

        checkpoint = Checkpoint(dict.fromkeys(shapes, Shapes()), name)  # type: ignore[arg-type]
        assert unicom_file.config_of(checkpoint, "") == config


def _almost(state: dict[str, Tensor]) -> dict[str, tuple[dict[str, Tensor], str]]:
    def without(*names: str) -> dict[str, Tensor]:
        return {n: x for n, x in state.items() if not n.startswith(names)}

    return {
        "another head": (
            without("feature.") | {"head.weight": torch.zeros(10, 48)},
            "lacks feature.0.weight",
        ),
        "a longer head": (state | {"feature.4.weight": torch.zeros(4, 20)}, "feature.4.weight"),
        "no grid": (state | {"pos_embed": torch.zeros(1, 5, 48)}, "no square of patches"),
        "the grid of others": (
            state | {"pos_embed": torch.zeros(1, 9, 48)},
            "feature.0.weight is",
        ),
        "no statistics": (without("feature.1.running"), "lacks feature.1.running_mean"),
        "no block": (without("blocks.0.mlp.fc2"), "lacks blocks.0.mlp.fc2.weight"),
        "a class token": (state | {"cls_token": torch.zeros(1, 1, 48)}, "unexpected: cls_token"),
        "biases of qkv": (
            state | {"blocks.0.attn.qkv.bias": torch.zeros(144)},
            "unexpected: blocks.0.attn.qkv.bias",
        ),
        "a negative variance": (
            state | {"feature.3.running_var": torch.full((20,), -1.0)},
            "running variance",
        ),
    }


@pytest.mark.parametrize("name", _almost({}).keys())
def test_what_is_almost_a_unicom_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changed, told = _almost(state_dict(48, 1, 7, 2, 20, seed=1))[name]
    torch.save(changed, tmp_path / "ViT.pt")
    with pytest.raises(CheckpointError) as refused:
        api.export_bundle(tmp_path / "ViT.pt", tmp_path / "bundle", heads=4)
    assert told in refused.value.message, refused.value.message
    assert not (tmp_path / "bundle").exists()


def test_heads_and_foreign_files_are_refused(tmp_path: Path) -> None:
    state = state_dict(48, 1, 7, 2, 20, seed=1)
    file = tmp_path / "ViT.pt"
    torch.save(state, file)
    with pytest.raises(ConfigError, match="48 channels, and does not say how many heads") as odd:
        api.export_bundle(file, tmp_path / "bundle")
    assert "--heads" in odd.value.hint
    with pytest.raises(ConfigError, match="--heads 5 does not divide"):
        api.export_bundle(file, tmp_path / "bundle", heads=5)
    with pytest.raises(ConfigError, match="--pooling 'mean'"):
        api.export_bundle(file, tmp_path / "bundle", heads=4, pooling="mean")
    with pytest.raises(ConfigError, match="--vision-tower is for models"):
        api.export_bundle(file, tmp_path / "bundle", heads=4, vision_tower="x")
    torch.save({"conv1.weight": torch.zeros(4, 3, 2, 2)}, file)
    with pytest.raises(ConfigError, match="MLCD in its native names"):
        api.export_bundle(file, tmp_path / "bundle")
    torch.save({"weight": torch.zeros(4)}, file)
    with pytest.raises(CheckpointError, match="no tower file that is known: it holds weight"):
        api.export_bundle(file, tmp_path / "bundle")
    torch.save({"state_dict": state, "epoch": 3}, file)
    with pytest.raises(CheckpointError, match="not a named tensor") as wrapped:
        api.export_bundle(file, tmp_path / "bundle")
    assert "state dict alone" in wrapped.value.hint
    file.write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError, match="cannot be read as torch weights"):
        api.export_bundle(file, tmp_path / "bundle")


def test_what_training_saved_is_exported(tmp_path: Path, generator: np.random.Generator) -> None:
    from edgevlm.training.towers.files import save_tower
    from edgevlm.training.towers.tower import Tower

    tower = Tower("unicom", unicom.tiny(), seed=3)
    with torch.no_grad():
        for name, statistic in tower.feature.named_buffers():
            if "running" in name:
                statistic.uniform_(0.5, 2)
    save_tower(tower, tmp_path / "saved")
    engine = engine_of(tmp_path / "saved", tmp_path)
    pixels = generator.standard_normal((2, 3, 21, 21)).astype(np.float32)
    with Embedder.open(engine) as opened, torch.no_grad():
        near(opened.run(pixels), tower.eval()(torch.from_numpy(pixels)).numpy())


def test_a_training_reads_the_same_sizes(tmp_path: Path) -> None:
    torch.save(state_dict(128, 1, 7, 2, 20, seed=1), tmp_path / "ViT.pt")
    stored = TorchFile(tmp_path / "ViT.pt")
    checkpoint = Checkpoint(dict.fromkeys(stored.keys(), stored), "ViT.pt")
    from edgevlm.training.towers.models import open_tower

    with pytest.raises(ConfigError, match="128 channels, and does not say how many heads"):
        open_tower(str(tmp_path / "ViT.pt"))
    config = unicom_file.config_of(checkpoint, "", 4)
    described = {"model_type": "unicom", **vars(config)}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert open_tower(str(tmp_path / "ViT.pt")).config == config
