"""Towers as modules: against the original UNICOM, the NumPy reference, and transformers."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints.weights import Checkpoint, Recipes, open_checkpoint
from edgevlm.toolkit.errors import CheckpointError, ConfigError, OutputError
from edgevlm.toolkit.images.resize import bicubic
from edgevlm.toolkit.models.encoders import unicom
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Weights
from edgevlm.training.torch_files import TorchFile
from edgevlm.training.torch_ops import TorchOps
from edgevlm.training.towers.files import published, read_tower, save_tower
from edgevlm.training.towers.sizes import resized
from edgevlm.training.towers.tower import KINDS, DroppedUpdates, Tower
from tests.training.towers.test_mlcd_loss import difference

hf: Any = transformers
UNICOM_GRID = {"position", "feature.0.weight"}


def tiny(kind: str) -> Any:
    """A small square instance."""
    config = models.encoder(kind).tiny()
    return replace(config, image_size=(28, 28)) if kind == "mlcd" else config


def made(kind: str, seed: int = 1, **options: Any) -> Tower:
    """A tower whose parameters are all random: norms, biases and statistics too."""
    tower = Tower(kind, tiny(kind), seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tower.state_dict().items():
            if tensor.is_floating_point():
                noise = 0.1 * torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)
    return tower


def pixels_of(tower: Tower, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, *tower.config.pixels, generator=generator)


# -- the original ------------------------------------------------------------------------------


def original(golden: Path) -> tuple[Tower, Tensor, Any]:
    """UNICOM's tiny model, its pixels, and what it computed."""
    tower = Tower("unicom", unicom.Config(48, 5, 4, 14, 70, 32))
    file = TorchFile(golden / "ViT-tiny.pt")
    read_tower(tower, Checkpoint(dict.fromkeys(file.keys(), file), "ViT-tiny.pt"))
    inputs, outputs = np.load(golden / "inputs.npz"), np.load(golden / "outputs.npz")
    return tower, torch.from_numpy(inputs["pixel_values"]), outputs


@pytest.mark.parametrize("golden", ["unicom_vit"], indirect=True)
def test_unicom_embeds_as_the_original_does(golden: Path) -> None:
    tower, pixels, outputs = original(golden)
    with torch.no_grad():
        assert difference(tower.eval()(pixels), outputs["embedding"]) < 1e-5
        norm: Any = tower.feature[1]
        mean = norm.running_mean.clone()
        training = tower.train()(pixels)
    assert difference(training, outputs["embedding_train_batchnorm"]) < 1e-5
    assert not torch.equal(mean, norm.running_mean)


@pytest.mark.parametrize("golden", ["unicom_vit"], indirect=True)
def test_unicoms_file_is_written_as_it_was_read(golden: Path, tmp_path: Path) -> None:
    tower, _, _ = original(golden)
    torch.save(published(tower), tmp_path / "tower.pt")
    written = torch.load(tmp_path / "tower.pt", weights_only=True)
    stored = torch.load(golden / "ViT-tiny.pt", weights_only=True)
    assert {k: x.dtype for k, x in written.items()} == {k: x.dtype for k, x in stored.items()}
    for name, tensor in stored.items():
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("golden", ["unicom_vit"], indirect=True)
def test_unicom_grows_as_the_original_does(golden: Path) -> None:
    tower, _, outputs = original(golden)
    pixels = torch.from_numpy(np.load(golden / "inputs.npz")["zoom.pixel_values"])
    grown = resized(tower.eval(), 112, as_original=True)
    state = grown.state_dict()
    assert difference(state["position"][None], outputs["zoom.pos_embed"]) < 1e-5
    assert difference(state["feature.0.weight"], outputs["zoom.feature0"]) < 1e-5
    with torch.no_grad():
        assert difference(grown(pixels), outputs["zoom.embedding"]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_changes_its_size(kind: str) -> None:
    tower = made(kind).eval()
    same, grown = (resized(tower, size) for size in (tower.config.pixels[0], 42))
    assert grown.config.pixels == (42, 42)
    with torch.no_grad():
        torch.testing.assert_close(same(pixels_of(tower)), tower(pixels_of(tower)))
        assert grown(pixels_of(grown)).isfinite().all()
    before, after = tower.state_dict(), grown.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"clip": {"position"}, "mlcd": set(), "unicom": UNICOM_GRID}[kind]
    if kind == "clip":
        table = before["position"]
        expected = bicubic(table[1:].reshape(4, 4, -1).numpy(), (6, 6), antialias=True)
        assert difference(after["position"][1:].reshape(6, 6, -1), expected) < 1e-5
        assert torch.equal(after["position"][0], table[0])
    with pytest.raises(ConfigError, match="no patch"):
        resized(tower, 5)


def test_a_grown_head_sums_over_more_tokens_to_the_same() -> None:
    tower = made("unicom")
    weight = tower.get_parameter("feature.0.weight")
    with torch.no_grad():
        per_token = weight[:, :32].clone()
        weight.copy_(per_token.repeat(1, 9))
    grown = resized(tower, 42).get_parameter("feature.0.weight")
    assert grown.shape == (32, 36 * 32)
    token = torch.arange(32.0)
    expected = weight @ token.repeat(9)
    assert difference(grown @ token.repeat(36), expected.detach()) < 1e-5


# -- the reference -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tower_is_what_the_reference_computes(kind: str, tmp_path: Path) -> None:
    tower = made(kind).eval()
    pixels = pixels_of(tower)
    save_tower(tower, tmp_path / "tower")
    checkpoint = open_checkpoint(tmp_path / "tower")
    file: Any = models.encoder(kind)
    if kind == "unicom":  # the batch norms are folded when the file is read
        weights = Weights(dict(Recipes(file.names(tower.config), checkpoint)))
        (found,) = file.forward(NumpyOps(), tower.config, weights, pixels.numpy())
        found = found[:, 0]
    else:
        table = {k: r.below("vision_model.") for k, r in file.embed_names(tower.config).items()}
        weights = Weights(dict(Recipes(table, checkpoint)))
        found = file.embed(NumpyOps(), tower.config, weights, pixels.numpy())
    with torch.no_grad():
        assert difference(tower(pixels), found) < 1e-5
        again = Tower(kind, tower.config, seed=5)
        read_tower(again, checkpoint)
        assert torch.equal(again.eval()(pixels), tower(pixels))
    with pytest.raises(OutputError, match="exists"):
        save_tower(tower, tmp_path / "tower")


@pytest.mark.parametrize("kind", ["clip", "mlcd"])
def test_transformers_reads_a_saved_tower(kind: str, tmp_path: Path) -> None:
    tower = made(kind).eval()
    save_tower(tower, tmp_path / "tower")
    model_class = {"clip": hf.CLIPVisionModel, "mlcd": hf.MLCDVisionModel}[kind]
    model = model_class.from_pretrained(tmp_path / "tower").eval()
    pixels = pixels_of(tower)
    with torch.no_grad():
        assert difference(tower(pixels), model(pixels).pooler_output) < 1e-5


def test_a_whole_clip_starts_a_tower(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = {**sizes, "num_hidden_layers": 3, "patch_size": 7, "image_size": 28}
    text = {**sizes, "num_hidden_layers": 1, "vocab_size": 50}
    model = hf.CLIPModel(hf.CLIPConfig(vision_config=vision, text_config=text)).eval()
    model.save_pretrained(tmp_path)
    tower = Tower("clip", tiny("clip")).eval()
    read_tower(tower, open_checkpoint(tmp_path))
    pixels = pixels_of(tower)
    with torch.no_grad():
        assert difference(tower(pixels), model.vision_model(pixels).pooler_output) < 1e-5


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str, recompute: bool) -> None:
    tower = made(kind, recompute=recompute)
    torch.autograd.backward(tower(pixels_of(tower)).square().sum())
    assert [n for n, p in tower.named_parameters() if p.grad is None or not p.grad.any()] == []
    if recompute:
        kept = made(kind)
        torch.autograd.backward(kept(pixels_of(kept)).square().sum())
        for (name, found), expected in zip(
            tower.named_parameters(), kept.parameters(), strict=True
        ):
            assert torch.equal(found.grad, expected.grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_runs_through_its_module(kind: str) -> None:
    tower = made(kind)
    layers = [tower.get_submodule(f"layers.{i}") for i in range(tower.config.num_layers)]
    seen: list[int] = []
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, i=i: seen.append(i))
    tower(pixels_of(tower))
    assert seen == list(range(len(layers)))
    doubled = copy.deepcopy(tower)  # an average of the weights is kept in a copy
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.zero_()
    assert not torch.equal(tower(pixels_of(tower)), doubled(pixels_of(tower)))


def test_stochastic_depth_drops_whole_updates_in_training_only() -> None:
    tower = made("unicom", drop_path=0.5)
    assert [tower.drop_rate(f"layers.{i}") for i in range(2)] == [0.0, 0.5]
    pixels = pixels_of(tower)
    assert torch.equal(tower.eval()(pixels), made("unicom").eval()(pixels))
    torch.manual_seed(1)
    tower.train()
    assert not torch.equal(tower(pixels), tower(pixels))
    update, x = torch.ones(1000, 2, 3), torch.zeros(1000, 2, 3)
    added = DroppedUpdates(TorchOps(), 0.25).add(update, x)
    per_image = added.flatten(1)
    assert torch.equal(per_image.amin(1), per_image.amax(1))
    assert torch.unique(added).tolist() == pytest.approx([0, 4 / 3])
    assert added.mean().item() == pytest.approx(1, abs=0.1)


def test_unicoms_head_computes_in_float32_under_autocast() -> None:
    tower = made("unicom")
    with torch.autocast("cpu", torch.bfloat16):
        found = tower(pixels_of(tower))
    assert found.dtype == torch.float32
    assert difference(found, tower(pixels_of(tower)).detach()) < 0.2


# -- refusals ----------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match="'siglip'"):
        Tower("siglip", models.encoder("siglip").tiny())
    with pytest.raises(ConfigError, match="clip has no stochastic depth"):
        Tower("clip", tiny("clip"), drop_path=0.1)
    with pytest.raises(ConfigError, match="embedding_dim is 0"):
        Tower("unicom", replace(tiny("unicom"), embedding_dim=0))


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="square"):
        save_tower(Tower("mlcd", models.encoder("mlcd").tiny()), tmp_path / "wide")
    save_tower(made("unicom"), tmp_path / "tower")
    checkpoint = open_checkpoint(tmp_path / "tower")
    with pytest.raises(CheckpointError, match=r"feature\.2\.weight is \[24, 32\]"):
        read_tower(Tower("unicom", replace(tiny("unicom"), embedding_dim=16)), checkpoint)
    with pytest.raises(CheckpointError, match="no tensor called"):
        read_tower(Tower("clip", tiny("clip")), checkpoint)
