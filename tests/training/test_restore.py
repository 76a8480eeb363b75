"""Trained weights go back into the published layout: names, shapes and values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from edgevlm.toolkit import models, systems
from edgevlm.toolkit.bundle import trained
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.checkpoints.weights import Checkpoint, open_checkpoint
from edgevlm.toolkit.errors import CheckpointError, ConfigError, OutputError
from edgevlm.toolkit.models.encoders import mlcd, unireplknet
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.training.restore import write_original
from edgevlm.training.torch_files import reader
from tests.conftest import HERE
from tests.systems import test_comm, test_huggingface, test_huggingface_next

hf: Any = transformers
GOLDENS = HERE / "goldens"
FOLDERS = {
    "llava": "e2e_llava15/llava-v1.5-tiny",
    "convllava": "e2e_convllava/convllava-tiny",
    "mmfuser": "e2e_mmfuser/llava-mmfuser-tiny",
    "mlcd": "mlcd_llavanext_e2e",
}
HUGGING_FACE = ["grouped heads", "qwen2 tied", "class token kept", "llama3 scaling"]
OPTIONS = Options(torch_reader=reader())


def folder_of(case: str, work: Path) -> Path:
    """A published folder of this name: a golden, or a model that transformers saved."""
    if case in FOLDERS:
        return GOLDENS / FOLDERS[case]
    folder = work / "published"
    if case in HUGGING_FACE:
        test_huggingface.save(folder, case)
    elif case in ("next", "onevision"):
        test_huggingface_next.save(folder, case == "onevision", "qwen2")
    else:
        test_comm.write(folder)
    return folder


CASES = [*FOLDERS, *HUGGING_FACE, "next", "onevision", "comm"]


def moved(source: Source, names: tuple[str, ...] = ("",), seed: int = 3) -> Source:
    """The source with noise on the tensors of components whose name begins so.

    DINOv2's positions, which are resized when they are read, stay.
    """
    weights: dict[str, Mapping[str, Array]] = {}
    for component, group in source.weights.items():
        if component.startswith(names):
            g = np.random.default_rng(seed)
            group = {
                key: tensor
                if (component, key) == ("encoder.dinov2", "position")
                else tensor + np.asarray(g.normal(0, 0.1, tensor.shape), np.float32)
                for key, tensor in sorted(group.items())
            }
        weights[component] = group
    return replace(source, weights=weights)


def stored(folder: Path) -> Checkpoint:
    return open_checkpoint(folder, reader())


def equal(a: Source, b: Source) -> bool:
    assert {n: set(g) for n, g in a.weights.items()} == {n: set(g) for n, g in b.weights.items()}
    return all(np.array_equal(a.weights[n][k], g[k]) for n, g in b.weights.items() for k in g)


@pytest.mark.parametrize("case", CASES)
def test_unchanged_weights_are_the_original_bit_for_bit(case: str, tmp_path: Path) -> None:
    folder, out = folder_of(case, tmp_path), tmp_path / "out"
    source = systems.load(folder, OPTIONS)
    write_original(out, source, folder, OPTIONS)
    before, after = stored(folder), stored(out)
    assert sorted(before.keys()) == sorted(after.keys())
    for key in before.keys():  # noqa: SIM118 (no mapping)
        assert before.dtype(key) == after.dtype(key)
        assert before.read(key).tobytes() == after.read(key).tobytes(), key
    assert (
        json.loads((out / "config.json").read_text()).keys()
        == json.loads((folder / "config.json").read_text()).keys()
    )
    again = systems.load(out, OPTIONS)
    assert equal(again, source)
    assert replace(again.model, name="") == replace(source.model, name="")


@pytest.mark.parametrize("case", CASES)
def test_trained_weights_are_read_back_exactly(case: str, tmp_path: Path) -> None:
    folder, out = folder_of(case, tmp_path), tmp_path / "out"
    source = systems.load(folder, OPTIONS)
    ours = moved(source)
    write_original(out, ours, folder, OPTIONS)
    again = systems.load(out, OPTIONS)
    assert equal(again, ours)
    before, after = stored(folder), stored(out)
    shapes = {key: after.shape(key) for key in before.keys()}  # noqa: SIM118 (no mapping)
    assert shapes == {key: before.shape(key) for key in shapes}


@pytest.mark.parametrize("case", [*HUGGING_FACE, "next", "onevision"])
def test_transformers_loads_what_is_written(case: str, tmp_path: Path) -> None:
    folder, out = folder_of(case, tmp_path), tmp_path / "out"
    write_original(out, moved(systems.load(folder, OPTIONS)), folder, OPTIONS)
    kind = json.loads((out / "config.json").read_text())["architectures"][0]
    model, told = getattr(hf, kind).from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    lm = systems.load(out, OPTIONS).weights["lm"]
    found = model.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(found, lm["embed.weight"])


# -- towers --------------------------------------------------------------------------------------


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_a_frozen_tower_stays_where_it_is(tmp_path: Path) -> None:
    folder, out = GOLDENS / FOLDERS["llava"], tmp_path / "out"
    source = systems.load(folder, OPTIONS)
    write_original(out, moved(source, ("lm", "merger")), folder, OPTIONS)
    assert Path(config_of(out)["mm_vision_tower"]) == (folder.parent / "clip-vit-tiny").resolve()
    assert not any("vision_tower" in key for key in stored(out).keys())  # noqa: SIM118
    beside = tmp_path / "work"
    shutil.copytree(folder.parent, beside)
    write_original(beside / "out", source, beside / folder.name, OPTIONS)
    assert config_of(beside / "out")["mm_vision_tower"] == "./clip-vit-tiny"


def test_a_frozen_tower_that_was_saved_in_bf16_stays_too(tmp_path: Path) -> None:
    folder, out = GOLDENS / FOLDERS["llava"], tmp_path / "out"
    source = systems.load(folder, OPTIONS)
    trained.write(tmp_path / "trained", source.model, source.tokenizer, source.weights,
                  dtype="bf16", origin=source.origin, training={}, made_by="tests")  # fmt: skip
    ours = systems.load(tmp_path / "trained", OPTIONS)
    write_original(out, ours, folder, OPTIONS)
    assert not any("vision_tower" in key for key in stored(out).keys())  # noqa: SIM118
    assert stored(out).dtype("model.layers.0.mlp.up_proj.weight") == "bf16"
    assert config_of(out)["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("case", ["llava", "mmfuser"])
def test_a_trained_transformer_tower_is_written_inside(case: str, tmp_path: Path) -> None:
    folder, out = GOLDENS / FOLDERS[case], tmp_path / "out"
    ours = moved(systems.load(folder, OPTIONS), ("encoder",))
    write_original(out, ours, folder, OPTIONS)
    prefix = "model.vision_tower.vision_tower.vision_model."
    assert f"{prefix}post_layernorm.weight" in stored(out)  # what we do not read is there too
    assert config_of(out)["unfreeze_mm_vision_tower"] is True
    assert equal(systems.load(out, OPTIONS), ours)
    write_original(tmp_path / "again", ours, out, OPTIONS)  # and from there once more
    assert equal(systems.load(tmp_path / "again", OPTIONS), ours)


def test_a_trained_convolutional_tower_is_a_folder_that_config_json_names(tmp_path: Path) -> None:
    folder, out = GOLDENS / FOLDERS["convllava"], tmp_path / "out"
    ours = moved(systems.load(folder, OPTIONS), ("encoder",))
    write_original(out, ours, folder, OPTIONS)
    assert config_of(out)["mm_vision_tower"] == str(out.resolve() / "vision_tower")
    out.rename(tmp_path / "moved")
    assert equal(systems.load(tmp_path / "moved", OPTIONS), ours)
    tower = hf.ConvNextModel.from_pretrained(tmp_path / "moved/vision_tower")
    scale = tower.state_dict()["encoder.stages.4.layers.1.layer_scale_parameter"].numpy()
    assert np.array_equal(scale, ours.weights["encoder.convnext"]["stages.4.blocks.1.scale"])


def test_files_keep_their_names_and_tensors(tmp_path: Path) -> None:
    """MMFuser's loader reads its gammas from the third of three files."""
    folder, out = GOLDENS / FOLDERS["mmfuser"], tmp_path / "out"
    write_original(out, moved(systems.load(folder, OPTIONS), ("merger",)), folder, OPTIONS)
    for path in folder.glob("*.safetensors"):
        assert set(SafetensorsFile(out / path.name).keys()) == set(SafetensorsFile(path).keys())
    from safetensors import safe_open

    with safe_open(out / "model-00003-of-00003.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file


def test_rows_that_the_tokenizer_lacks_are_put_back(tmp_path: Path) -> None:
    folder, out = GOLDENS / FOLDERS["mlcd"], tmp_path / "out"
    source = systems.load(folder, OPTIONS)
    rows, key = source.model.lm.config.vocab_size, "model.embed_tokens.weight"
    assert rows < stored(folder).shape(key)[0]
    write_original(out, moved(source), folder, OPTIONS)
    assert np.array_equal(stored(out).read(key)[rows:], stored(folder).read(key)[rows:])


def test_a_tied_head_that_is_stored_follows_the_embedding(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, out = folder_of("qwen2 tied", tmp_path), tmp_path / "out"
    tensors = load_file(folder / "model.safetensors")
    embed = next(k for k in tensors if k.endswith("embed_tokens.weight"))
    tensors["language_model.lm_head.weight"] = tensors[embed].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_original(out, moved(systems.load(folder, OPTIONS)), folder, OPTIONS)
    after = stored(out)
    assert np.array_equal(after.read(embed), after.read("language_model.lm_head.weight"))


def test_torch_files_become_safetensors(tmp_path: Path) -> None:
    from tests.systems import joined

    folder = tmp_path / "published"
    shutil.copytree(GOLDENS / "e2e_llava15", tmp_path / "golden")
    source = tmp_path / "golden/llava-v1.5-tiny"
    shutil.copytree(source, folder)
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    joined.shard(folder, tensors, 2, True)
    (tmp_path / "golden/clip-vit-tiny").rename(tmp_path / "clip-vit-tiny")
    ours = moved(systems.load(folder, OPTIONS))
    write_original(tmp_path / "out", ours, folder, OPTIONS)
    names = {path.name for path in (tmp_path / "out").glob("model-*")}
    assert names == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert equal(systems.load(tmp_path / "out", OPTIONS), ours)


# -- recipes -------------------------------------------------------------------------------------


def check_inverse(
    table: Any, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Array]
) -> None:
    """Undoing is the inverse of making, for stored tensors with other values in their place."""
    g = np.random.default_rng(0)
    for name, recipe in table.items():
        if recipe.undo is None:
            continue
        ours = g.normal(size=shapes[name]).astype(np.float32)
        before = [stored[source] for source in recipe.sources]
        after = recipe.undo(ours, *before)
        assert [a.shape for a in after] == [b.shape for b in before], name
        assert np.array_equal(recipe.make(*after), ours), name


@pytest.mark.parametrize("case", ["native mlcd", "unireplknet merged", "unireplknet open"])
def test_recipes_of_towers_in_files_of_their_own_are_inverted(case: str) -> None:
    if case == "native mlcd":
        file = SafetensorsFile(GOLDENS / "mlcd_vit_rope2d/native.safetensors")
        from edgevlm.toolkit.strict import Reader, read_json

        path = GOLDENS / "mlcd_vit_rope2d/hf/config.json"
        config: Any = mlcd.Config.read(Reader(read_json(path), str(path)), (-1,), False)
        table, shapes = mlcd.native_names(config), mlcd.shapes(config)
    else:
        name = "weights_deploy" if case.endswith("merged") else "weights"
        file = SafetensorsFile(GOLDENS / f"unireplknet5/{name}.safetensors")
        config = unireplknet.Config.of({k: file.shape(k) for k in file.keys()}, "x")  # noqa: SIM118
        table, shapes = unireplknet.names(config), unireplknet.shapes(config)
        assert any(r.undo is None for r in table.values()) is (case == "unireplknet open")
    check_inverse(table, shapes, {key: file.read(key) for key in file.keys()})  # noqa: SIM118


@pytest.mark.parametrize("change", [{}, {"trained_image_size": 28}])
def test_dinov2_is_inverted_but_for_resized_positions(change: dict[str, int]) -> None:
    file = models.encoder("dinov2")
    c = replace(file.tiny(), **change)
    table, shapes, d = file.names(c), file.shapes(c), c.hidden_size
    side = (c.trained_image_size // c.patch_size) ** 2 + 1
    g = np.random.default_rng(1)
    special = {
        "embeddings.cls_token": (1, 1, d),
        "embeddings.register_tokens": (1, c.num_registers, d),
        "embeddings.position_embeddings": (1, side, d),
    }
    tensors: dict[str, Array] = {}
    for name, recipe in table.items():
        (source,) = recipe.sources
        shape = shapes[name][::-1] if len(shapes[name]) == 2 else shapes[name]
        if "weights_in" in source:
            shape = (2 * shape[0], *shape[1:])
        tensors[source] = g.normal(size=special.get(source, shape)).astype(np.float32)
    check_inverse(table, shapes, tensors)
    assert (table["position"].undo is None) is (change == {})


# -- refusals ------------------------------------------------------------------------------------


def test_positions_that_were_resized_can_only_stay(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    test_comm.write(folder)  # DINOv2 with positions of 98 pixels on images of 56
    source = systems.load(folder, OPTIONS)
    noise = dict(source.weights["encoder.dinov2"])
    noise["position"] = noise["position"] + np.float32(1)
    ours = replace(source, weights={**source.weights, "encoder.dinov2": noise})
    with pytest.raises(CheckpointError, match="position was trained"):
        write_original(tmp_path / "out", ours, folder, OPTIONS)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    source = systems.load(GOLDENS / FOLDERS["llava"], OPTIONS)
    with pytest.raises(ConfigError, match="its system is another"):
        write_original(tmp_path / "out", source, GOLDENS / FOLDERS["convllava"], OPTIONS)
    changed = replace(source.model.lm.config, theta=5.0)
    model = replace(source.model, lm=replace(source.model.lm, config=changed))
    with pytest.raises(ConfigError, match="language model is another"):
        write_original(
            tmp_path / "out", replace(source, model=model), GOLDENS / FOLDERS["llava"], OPTIONS
        )


def test_a_checkpoint_of_an_earlier_stage_names_the_folder(tmp_path: Path) -> None:
    folder = GOLDENS / FOLDERS["llava"]
    source = systems.load(folder, OPTIONS)

    def save(name: str, origin: Mapping[str, Any]) -> Source:
        trained.write(tmp_path / name, source.model, source.tokenizer, source.weights,
                      origin=origin, training={"stage": name}, made_by="tests")  # fmt: skip
        return systems.load(tmp_path / name, OPTIONS)

    first = save("first", {**source.origin, "folder": str(folder)})
    second = save("second", first.origin)
    assert second.origin["trained_from"] == "llava"
    assert second.origin["earlier"] == [{"stage": "first"}]
    write_original(tmp_path / "out", second, tmp_path / "first", OPTIONS)
    assert equal(systems.load(tmp_path / "out", OPTIONS), source)
    save("nameless", source.origin)
    with pytest.raises(ConfigError, match="does not name the folder"):
        write_original(tmp_path / "o", second, tmp_path / "nameless", OPTIONS)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    source = systems.load(GOLDENS / FOLDERS["llava"], OPTIONS)
    with pytest.raises(ConfigError, match="expected one of fp32, bf16, fp16"):
        write_original(tmp_path / "o", source, GOLDENS / FOLDERS["llava"], OPTIONS, dtype="int8")


def test_weights_that_a_quirk_replaced_are_refused(tmp_path: Path) -> None:
    options = replace(OPTIONS, quirks=("renamed-gamma",))
    source = systems.load(GOLDENS / FOLDERS["mmfuser"], options)
    with pytest.raises(ConfigError, match="changed while it is read"):
        write_original(tmp_path / "out", source, GOLDENS / FOLDERS["mmfuser"], options)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "work/llava-v1.5-tiny"
    shutil.copytree(GOLDENS / "e2e_llava15", tmp_path / "work")
    source = systems.load(folder, OPTIONS)
    for out in (folder, tmp_path / "work"):
        with pytest.raises(OutputError):
            write_original(out, source, folder, OPTIONS, force=True)


def test_an_adapter_with_its_base_becomes_a_whole_folder(tmp_path: Path) -> None:
    """A projector alone, joined with its base: sorted into files anew."""
    from safetensors.numpy import load_file, save_file

    base, part = GOLDENS / FOLDERS["llava"], tmp_path / "llava-projector"
    part.mkdir()
    tensors = load_file(base / "model.safetensors")
    mine = {k: t for k, t in tensors.items() if "mm_projector" in k}
    save_file(mine, part / "mm_projector.safetensors")
    config = config_of(base) | {"mm_vision_tower": str(base.parent / "clip-vit-tiny")}
    (part / "config.json").write_text(json.dumps(config))
    options = replace(OPTIONS, base=base)
    ours = moved(systems.load(part, options))
    write_original(tmp_path / "out", ours, part, options)
    assert equal(systems.load(tmp_path / "out", OPTIONS), ours)
