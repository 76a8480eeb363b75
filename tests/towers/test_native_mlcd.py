"""MLCD's own weight files: read as the folder of the same weights is, and strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgevlm import api
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.vlm.components import components
from edgevlm.training.towers.models import open_tower
from tests.conftest import golden_case

Tensors = dict[str, torch.Tensor]


def native(side: int, folder: Path, tensors: Tensors) -> Path:
    """A .pt file with the preprocessing of images of `side` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "MLCD.pt")
    rule = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
        "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
        "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side},
        "rescale_factor": 1 / 255, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(rule))
    return folder / "MLCD.pt"


@pytest.fixture
def stored() -> Tensors:
    return dict(load_file(golden_case("mlcd_vit_rope2d") / "native.safetensors"))


def embedded(bundle: Bundle, pixels: Array) -> Array:
    (part,) = components(bundle.model)
    weights: Weights[Array] = Weights(bundle.tensors(part.name))
    (found,) = part.forward(NumpyOps(), weights, {"pixels": pixels}).values()
    return np.asarray(found)


@pytest.mark.parametrize(("prefix", "dtype", "tolerance"), [
    ("", torch.float32, 1e-5), ("_orig_mod.", torch.float32, 1e-5),
    ("module._orig_mod.", torch.float16, 2e-2), ("", torch.bfloat16, 1e-1),
])  # fmt: skip
@pytest.mark.parametrize("case", ["square", "square_large"])
def test_the_original_s_embeddings(
    case: str, prefix: str, dtype: torch.dtype, tolerance: float, stored: Tensors, tmp_path: Path
) -> None:
    golden = golden_case("mlcd_vit_rope2d")
    pixels = np.load(golden / "inputs.npz")[case]
    expected = np.load(golden / "outputs.npz")[f"{case}.pooled"]
    # what old files hold, and the original drops
    old = {"positional_embedding": torch.zeros(17, 64), "proj": torch.zeros(64, 8)}
    tensors = {prefix + k: t.to(dtype) for k, t in {**stored, **old}.items()}
    bundle = api.export_bundle(native(pixels.shape[2], tmp_path, tensors), tmp_path / "bundle")
    config: Any = bundle.model.encoders[0].config
    assert (config.num_heads, config.num_layers, config.pixels) == (4, 4, pixels.shape[2:])
    np.testing.assert_allclose(embedded(bundle, pixels), expected, atol=tolerance)


def test_a_training_begins_with_one(stored: Tensors, tmp_path: Path) -> None:
    golden = golden_case("mlcd_vit_rope2d")
    pixels = np.load(golden / "inputs.npz")["square"]
    file = native(56, tmp_path, {f"_orig_mod.{k}": t for k, t in stored.items()})
    for size in (None, 56):
        tower = open_tower(str(file), image_size=size)
        assert tower.config.pixels == (56, 56)
        with torch.no_grad():
            found = tower.eval()(torch.from_numpy(pixels)).numpy()
        expected = np.load(golden / "outputs.npz")["square.pooled"]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        (tmp_path / "preprocessor_config.json").unlink(missing_ok=True)  # the size may be given
    with pytest.raises(ConfigError, match="state no size of images"):
        open_tower(str(file))
    torch.save(stored | {"head": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="head"):
        open_tower(str(file), image_size=56)


def test_what_is_almost_one_is_refused_by_name(stored: Tensors, tmp_path: Path) -> None:
    def refused(kind: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            api.export_bundle(tmp_path / "MLCD.pt", tmp_path / "bundle", **options)

    native(56, tmp_path, {k: t for k, t in stored.items() if k != "ln_post.bias"})
    refused(CheckpointError, "ln_post.bias")
    native(56, tmp_path, stored | {"head.weight": torch.zeros(2, 2)})
    refused(CheckpointError, "head.weight")
    native(56, tmp_path, stored | {"ln_pre.weight": torch.zeros(63)})
    refused(CheckpointError, "ln_pre.weight")
    native(56, tmp_path, {k: t for k, t in stored.items() if k != "class_pos_emb"})
    refused(CheckpointError, "almost an MLCD in its native names, but it lacks class_pos_emb")
    native(56, tmp_path, stored | {"class_pos_emb": torch.zeros(1, 5)})
    refused(CheckpointError, "heads of 10 channels, it has 64 channels")
    native(60, tmp_path, stored)
    refused(ConfigError, r"images of \(60, 60\), which are not made of its patches of 14 pixels")
    refused(ConfigError, "--heads 4 has no effect", heads=4)
    (tmp_path / "preprocessor_config.json").unlink()
    refused(ConfigError, "state no size of images")
