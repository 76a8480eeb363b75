"""A new model is what its layout's loader would read; its merger begins as the original's does."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle import trained
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.models.encoders import convnext
from edgevlm.toolkit.models.mergers import mmfuser
from edgevlm.toolkit.vlm.config import ComponentConfig
from edgevlm.training import initial
from edgevlm.training.assemble import assemble, with_settings
from edgevlm.training.grown import with_fifth_stage
from edgevlm.training.restore import write_original
from tests.conftest import HERE
from tests.pipeline import engine_of
from tests.systems.joined import language_model
from tests.systems.test_huggingface import CLIP, TOKENIZER, clip_processor, scatter
from tests.training.test_restore import OPTIONS, equal, moved

hf: Any = transformers
GOLDENS = HERE / "goldens"
OF_LM = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")


def vicuna(folder: Path) -> Path:
    """The language model of the golden LLaVA-1.5, as a folder of its own."""
    shutil.copytree(TOKENIZER, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if k.startswith(OF_LM)},
              folder / "model.safetensors")  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config = {
        k: v
        for k, v in config.items()
        if not any(word in k for word in ("mm_", "image", "tokenizer"))
    }
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def qwen(folder: Path) -> Path:
    """A random Qwen2 with the golden Qwen tokenizer and more rows than tokens."""
    language_model("qwen2", vocab_size=1024).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(GOLDENS / "mlcd_llavanext_e2e" / name, folder)
    return folder


def saved(folder: Path, module: Any, size: int) -> Path:
    scatter(module)
    module.save_pretrained(folder)
    clip_processor(size).save_pretrained(folder)
    return folder


def clip(folder: Path, layers: int = 3) -> Path:
    config = hf.CLIPVisionConfig(**(CLIP | {"num_hidden_layers": layers}))
    return saved(folder, hf.CLIPVisionModel(config), 56)


def four_stages(folder: Path) -> Path:
    config = hf.ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 32, 48], image_size=64)
    return saved(folder, hf.ConvNextModel(config), 64)


def dinov2(folder: Path) -> Path:
    config = hf.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, patch_size=14, image_size=56
    )
    return saved(folder, hf.Dinov2Model(config), 56)


def made(system: str, work: Path) -> Source:
    """A tiny new model of the system."""
    lm = qwen(work / "qwen") if system in ("llava_next", "mlcd") else vicuna(work / "vicuna")
    overrides: dict[str, Any] = {}
    if system == "comm":
        towers = {"clip": clip(work / "clip"), "dinov2": dinov2(work / "dinov2")}
    elif system == "convllava":
        towers, overrides = {"convnext": four_stages(work / "convnext")}, {"image_size": 128}
    elif system == "mmfuser":
        towers = {"clip": clip(work / "clip", 22)}
    else:
        towers = {"clip": clip(work / ("mlcd-vit" if system == "mlcd" else "clip"))}
    return assemble(system, lm, towers, seed=4, overrides=overrides)


SYSTEMS = ["comm", "convllava", "llava", "llava_next", "mlcd", "mmfuser"]


def keep(folder: Path, source: Source) -> Path:
    trained.write(folder, source.model, source.tokenizer, source.weights, origin=source.origin,
                  training={"stage": "new"}, made_by="tests")  # fmt: skip
    return folder


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_new_model_exports_and_builds(system: str, tmp_path: Path) -> None:
    source = made(system, tmp_path)
    assert source.model.system == system
    session = Session.open(engine_of(keep(tmp_path / "new", source), tmp_path))
    assert session.model == source.model
    session.close()


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_trained_new_model_is_written_in_its_original_layout(system: str, tmp_path: Path) -> None:
    source = made(system, tmp_path)
    again = systems.load(keep(tmp_path / "trained", moved(source)), OPTIONS)
    lm = tmp_path / ("qwen" if system in ("llava_next", "mlcd") else "vicuna")
    write_original(tmp_path / "out", again, lm, OPTIONS)
    found = systems.load(tmp_path / "out", OPTIONS)
    assert equal(found, again)
    assert found.model.system == system
    assert found.model.encoders == source.model.encoders
    assert found.model.images == source.model.images


def test_llava_from_the_goldens_parts_is_the_golden_but_for_its_projector(tmp_path: Path) -> None:
    tower = GOLDENS / "e2e_llava15/clip-vit-tiny"
    new, golden = assemble("llava", vicuna(tmp_path / "vicuna"), {"clip": tower}), TOKENIZER
    old = systems.load(golden, Options())
    assert replace(new.model, name="") == replace(old.model, name="")
    assert new.tokenizer == old.tokenizer
    for name in ("encoder.clip", "lm"):
        assert set(new.weights[name]) == set(old.weights[name])
        for key, tensor in old.weights[name].items():
            assert np.array_equal(new.weights[name][key], tensor)
    assert {k: t.shape for k, t in new.weights["merger"].items()} == {
        k: t.shape for k, t in old.weights["merger"].items()
    }


def test_published_values_are_those_of_the_original(tmp_path: Path) -> None:
    tiled = made("llava_next", tmp_path).model
    assert tiled.images.tiling is not None
    assert tiled.images.tiling.pinpoints == ((56, 112), (112, 56), (112, 112), (168, 56),
                                               (56, 168))  # fmt: skip
    assert tiled.images.arrangement is not None
    assert tiled.images.arrangement.newline
    lm = tmp_path / "qwen"
    plain = {"image_aspect_ratio": "square", "mm_patch_merge_type": "flat"}
    first = assemble("llava_next", lm, {"clip": tmp_path / "clip"}, overrides=plain)
    assert (first.model.images.tiling, first.model.images.arrangement) == (None, None)
    assert "newline" not in first.weights["merger"]


def test_a_later_stage_has_other_settings_and_the_same_weights(tmp_path: Path) -> None:
    plain = {"image_aspect_ratio": "square", "mm_patch_merge_type": "flat"}
    lm, tower = qwen(tmp_path / "qwen"), clip(tmp_path / "clip")
    first = moved(assemble("llava_next", lm, {"clip": tower}, overrides=plain))
    first = systems.load(keep(tmp_path / "first", first), OPTIONS)
    tiled = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    second = with_settings(first, tiled)
    direct = assemble("llava_next", lm, {"clip": tower})
    assert second.model == direct.model
    weights = {name: dict(group) for name, group in second.weights.items()}
    newline = weights["merger"].pop("newline")
    assert np.array_equal(newline, direct.weights["merger"]["newline"])
    assert equal(replace(second, weights=weights), first)
    again = systems.load(keep(tmp_path / "second", second), OPTIONS)
    write_original(tmp_path / "out", again, lm, OPTIONS)
    assert equal(systems.load(tmp_path / "out", OPTIONS), again)
    with pytest.raises(ConfigError, match="do not fit"):
        with_settings(first, {"mm_projector_type": "linear"})
    with pytest.raises(ConfigError, match="was not put together here"):
        with_settings(systems.load(TOKENIZER, Options()), tiled)


def test_siglip_and_mistral_make_a_llava_too(tmp_path: Path) -> None:
    lm = tmp_path / "mistral"
    language_model("mistral", vocab_size=1000).save_pretrained(lm)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, lm)
    config = hf.SiglipVisionConfig(**CLIP)
    tower = saved(tmp_path / "siglip", hf.SiglipVisionModel(config), 56)
    source = assemble("llava", lm, {"siglip": tower})
    ours = systems.load(keep(tmp_path / "trained", moved(source)), OPTIONS)
    write_original(tmp_path / "out", ours, lm, OPTIONS)
    assert equal(systems.load(tmp_path / "out", OPTIONS), ours)


# -- initial values ------------------------------------------------------------------------------


def test_the_fuser_begins_as_the_identity(tmp_path: Path) -> None:
    merger = made("mmfuser", tmp_path).weights["merger"]
    zeros = ["gamma1", "gamma2", "cross.offsets.weight", "self.scores.weight", "cross.value.bias"]
    assert all(not merger[f"fuser.{name}"].any() for name in zeros)
    bound = math.sqrt(6 / 64)
    assert 0.9 * bound < np.abs(merger["fuser.cross.value.weight"]).max() <= bound
    assert np.array_equal(merger["fuser.norm_query.weight"], np.ones(32))


def test_sampling_directions_are_those_of_the_published_code() -> None:
    """MSDeformAttn._reset_parameters, written with torch as there."""
    c = mmfuser.Config(hidden_size=64, side=4, outputs=8, num_heads=8, num_points=4)
    shapes = mmfuser.shapes(c)
    found = initial.merger(ComponentConfig("merger", "mmfuser", c), shapes, 0)
    for name, levels in (("cross", 4), ("self", 1)):
        thetas = torch.arange(8, dtype=torch.float32) * (2.0 * math.pi / 8)
        grid = torch.stack([thetas.cos(), thetas.sin()], -1)
        grid = (grid / grid.abs().max(-1, keepdim=True)[0]).view(8, 1, 1, 2).repeat(1, levels, 4, 1)
        for point in range(4):
            grid[:, :, point, :] *= point + 1
        np.testing.assert_allclose(
            found[f"fuser.{name}.offsets.bias"], grid.view(-1).numpy(), atol=1e-6
        )


def test_linears_are_drawn_as_torch_draws_them(tmp_path: Path) -> None:
    merger = made("llava_next", tmp_path).weights["merger"]
    for leaf in ("weight", "bias"):
        drawn, bound = merger[f"linears.0.{leaf}"], 32**-0.5
        assert 0.9 * bound < np.abs(drawn).max() <= bound
    assert abs(merger["linears.0.weight"].std() - 32**-0.5 / math.sqrt(3)) < 0.01
    assert abs(merger["newline"].std() - 48**-0.5) < 0.05


def test_comm_begins_with_equal_levels(tmp_path: Path) -> None:
    merger = made("comm", tmp_path).weights["merger"]
    assert not merger["clip.scale"].any()
    assert np.array_equal(merger["clip.norm.weight"], np.ones((3, 32)))
    bound = np.abs(merger["clip.linear.weight"]).max()
    assert 0.9 * 32**-0.5 < bound <= 32**-0.5
    assert np.abs(merger["clip.linear.bias"]).max() <= 32**-0.5


def test_the_seed_decides(tmp_path: Path) -> None:
    lm, tower = vicuna(tmp_path / "vicuna"), clip(tmp_path / "clip")
    a, b, c = (assemble("llava", lm, {"clip": tower}, seed=s).weights["merger"] for s in (1, 1, 2))
    assert np.array_equal(a["linears.0.weight"], b["linears.0.weight"])
    assert not np.array_equal(a["linears.0.weight"], c["linears.0.weight"])


# -- ConvLLaVA -----------------------------------------------------------------------------------


def test_a_fifth_stage_is_appended_trained_and_written(tmp_path: Path) -> None:
    source = made("convllava", tmp_path)
    grown = with_fifth_stage(source, blocks=2, width=64, seed=1)
    config = grown.model.encoders[0].config
    assert (config.depths, config.dims) == ((1, 1, 2, 1, 2), (8, 16, 32, 48, 64))
    assert grown.model.merger.config.inputs == (64,)
    tower = grown.weights["encoder.convnext"]
    assert np.array_equal(tower["stages.4.blocks.1.scale"], np.full(64, 1e-6, np.float32))
    assert 0.9 / 7 < np.abs(tower["stages.4.blocks.0.depthwise.weight"]).max() <= 1 / 7
    older = source.weights["encoder.convnext"]
    assert all(np.array_equal(tower[key], older[key]) for key in older)

    engine_of(keep(tmp_path / "new", grown), tmp_path)
    again = systems.load(keep(tmp_path / "trained", moved(grown)), OPTIONS)
    write_original(tmp_path / "out", again, tmp_path / "vicuna", OPTIONS)
    found = systems.load(tmp_path / "out", OPTIONS)
    assert equal(found, again)
    assert found.model.encoders == grown.model.encoders
    assert found.model.images == grown.model.images
    stated = json.loads((tmp_path / "out/vision_tower/config.json").read_text())
    assert (stated["num_stages"], stated["image_size"]) == (5, 128)
    module = hf.ConvNextModel.from_pretrained(tmp_path / "out/vision_tower")
    assert len(module.encoder.stages) == 5


def test_a_tower_is_extended_once(tmp_path: Path) -> None:
    grown = with_fifth_stage(made("convllava", tmp_path), blocks=1, width=64)
    with pytest.raises(ConfigError, match="already has 5 stages"):
        with_fifth_stage(grown)
    with pytest.raises(ConfigError, match="appended to a ConvNeXt"):
        with_fifth_stage(systems.load(TOKENIZER, Options()))
    golden = systems.load(GOLDENS / "e2e_convllava/convllava-tiny", Options())
    with pytest.raises(ConfigError, match="already has 5 stages"):
        with_fifth_stage(golden)
    assert isinstance(golden.model.encoders[0].config, convnext.Config)


def test_images_have_the_size_that_is_asked_for(tmp_path: Path) -> None:
    model = made("convllava", tmp_path).model
    assert model.images.encoders["convnext"].size == (128, 128)
    assert model.encoders[0].config.image_size == 128
    with pytest.raises(ConfigError, match="no multiple"):
        assemble("convllava", tmp_path / "vicuna", {"convnext": tmp_path / "convnext"},
                 overrides={"image_size": 100})  # fmt: skip


# -- refusals ------------------------------------------------------------------------------------


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    lm, tower = vicuna(tmp_path / "vicuna"), clip(tmp_path / "clip")
    wrong: list[tuple[str, Path, dict[str, Path], dict[str, Any], str]] = [
        ("gpt", lm, {"clip": tower}, {}, "no model of system"),
        ("llava", lm, {}, {}, "takes one of clip or siglip"),
        ("llava", lm, {"convnext": tower}, {}, "takes one of clip or siglip"),
        ("llava", lm, {"siglip": tower}, {}, "tower of kind clip, not siglip"),
        ("comm", lm, {"clip": tower}, {}, "takes both of clip and dinov2"),
        ("llava", TOKENIZER, {"clip": tower}, {}, "is no language model"),
        ("llava", tower, {"clip": tower}, {}, "is no language model"),
        ("llava", lm, {"clip": lm / "nothing"}, {}, "no folder of a vision tower"),
        ("mlcd", lm, {"clip": tower}, {}, "'mlcd' in its name"),
        ("mmfuser", lm, {"clip": tower}, {}, "does not exist in a tower of 3 blocks"),
        ("llava", lm, {"clip": tower}, {"mm_odd": 1}, "unknown keys: mm_odd"),
        ("llava", lm, {"clip": tower}, {"image_size": 1}, "unknown keys: image_size"),
    ]
    for system, language, towers, overrides, reason in wrong:
        with pytest.raises((ConfigError, CheckpointError)) as refused:
            assemble(system, language, towers, overrides=overrides)
        assert reason in refused.value.message


def test_a_merger_with_batch_norms_is_not_made(tmp_path: Path) -> None:
    lm = vicuna(tmp_path / "vicuna")
    towers = {"clip": clip(tmp_path / "clip"), "dinov2": dinov2(tmp_path / "dinov2")}
    with pytest.raises(ConfigError, match="is not implemented"):
        assemble("comm", lm, towers, overrides={"merge": "conv1"})
