"""Our own checkpoint format: what training writes is read back, whole, strictly and by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import api
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle import trained
from edgevlm.toolkit.checkpoints import shards
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.errors import CheckpointError, ConfigError, OutputError
from edgevlm.toolkit.ops.vocabulary import Array
from tests.conftest import HERE
from tests.pipeline import ask, engine_of
from tests.sealing import edit_sealed

LLAVA = HERE / "goldens/e2e_llava15/llava-v1.5-tiny"
FACTS: dict[str, Any] = {
    "origin": {"layout": "llava", "folder": "somewhere"},
    "training": {"stage": "projector", "steps": 3},
    "made_by": "tests",
}


def llava() -> Source:
    return systems.load(LLAVA, Options())


def save(folder: Path, source: Source, **changes: Any) -> Path:
    facts = FACTS | {"dtype": "fp32", "force": False} | changes
    trained.write(folder, source.model, source.tokenizer, source.weights, **facts)
    return folder


def same(a: Mapping[str, Mapping[str, Array]], b: Mapping[str, Mapping[str, Array]]) -> bool:
    return {name: set(group) for name, group in a.items()} == {
        name: set(group) for name, group in b.items()
    } and all(np.array_equal(a[n][key], b[n][key]) for n in a for key in a[n])


@pytest.mark.parametrize("name", ["e2e_llava15/llava-v1.5-tiny", "e2e_convllava/convllava-tiny",
                                  "e2e_mmfuser/llava-mmfuser-tiny",
                                  "mlcd_llavanext_e2e"])  # fmt: skip
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    source = systems.load(HERE / "goldens" / name, Options())
    again = systems.load(save(tmp_path / "saved", source), Options())
    assert again.model == source.model
    assert again.tokenizer == source.tokenizer
    assert same(again.weights, source.weights)
    assert again.origin["training"] == FACTS["training"]


def test_names_say_component_and_path(tmp_path: Path) -> None:
    file = SafetensorsFile(save(tmp_path / "saved", llava()) / "model.safetensors")
    assert {"encoder.clip.layers.0.attention.q.weight", "lm.embed.weight"} <= set(file.keys())


def test_it_exports_and_answers_as_the_original(tmp_path: Path) -> None:
    prompt, image = "USER: <image>\nWhat? ASSISTANT:", LLAVA.parent / "image.png"
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    expected = ask(engine_of(LLAVA, tmp_path / "first"), prompt, [image], 12)
    found = ask(engine_of(save(tmp_path / "s", llava()), tmp_path / "second"), prompt, [image], 12)
    assert found.token_ids == expected.token_ids


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_rounded_once(dtype: str, tmp_path: Path) -> None:
    source = llava()
    once = systems.load(save(tmp_path / "once", source, dtype=dtype), Options())
    twice = systems.load(save(tmp_path / "twice", once, dtype=dtype), Options())
    assert same(once.weights, twice.weights)
    error = np.abs(once.weights["lm"]["norm.weight"] - source.weights["lm"]["norm.weight"]).max()
    assert error < 0.02
    assert once.origin["dtype"] == dtype


def test_large_models_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = shards.split
    monkeypatch.setattr(shards, "split", lambda specs: original(specs, 200_000))
    source = llava()
    folder = save(tmp_path / "saved", source)
    assert len(list(folder.glob("model-0000?-of-0000?.safetensors"))) > 3
    assert same(systems.load(folder, Options()).weights, source.weights)
    listed = trained.read_description(folder).files
    assert set(listed) == {path.name for path in folder.iterdir()} - {"checkpoint.json"}


def test_an_existing_folder_is_replaced_by_force_alone(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", llava())
    with pytest.raises(OutputError):
        save(folder, llava())
    save(folder, llava(), force=True)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(OutputError, match=r"metrics\.jsonl"):
        save(folder, llava(), force=True)


# -- beside other files ------------------------------------------------------------------------


def into(folder: Path, source: Source) -> None:
    trained.write_into(
        folder, source.model, source.tokenizer, source.weights, dtype="fp32", **FACTS
    )


def test_files_of_a_run_stay_and_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "states").mkdir()
    (tmp_path / "training.json").write_text("{}")
    source = llava()
    into(tmp_path, source)
    assert same(systems.load(tmp_path, Options()).weights, source.weights)
    names = {"states", "training.json", "checkpoint.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_an_older_checkpoint_is_replaced_with_all_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = shards.split
    monkeypatch.setattr(shards, "split", lambda specs: original(specs, 200_000))
    into(tmp_path, llava())
    monkeypatch.setattr(shards, "split", original)
    into(tmp_path, llava())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint.json", "model.safetensors", "tokenizer.json"}


def test_a_writer_that_fails_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    source = llava()
    into(tmp_path, source)
    before = (tmp_path / "checkpoint.json").read_bytes()

    class Failing(dict[str, Array]):
        def __getitem__(self, key: str) -> Array:
            raise RuntimeError("killed")

    failing = Failing({key: np.zeros(0) for key in source.weights["lm"]})
    weights = {**source.weights, "lm": failing}
    with pytest.raises(RuntimeError, match="killed"):
        trained.write_into(tmp_path, source.model, source.tokenizer, weights, **FACTS)
    assert (tmp_path / "checkpoint.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3
    assert same(systems.load(tmp_path, Options()).weights, source.weights)


# -- refusals ----------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Array]], object]) -> None:
    """Change the tensors and correct the listed size, so that only their names can tell."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    described(folder, lambda d: d["files"]["model.safetensors"].update(
        nbytes=(folder / "model.safetensors").stat().st_size))  # fmt: skip


def described(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_sealed(folder / "checkpoint.json", change)


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


NORM = "lm.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: rewrite(f, lambda t: t.pop(NORM)), f"1 missing: {NORM}"),
    "extra": (lambda f: rewrite(f, lambda t: t.update(odd=t[NORM])), "1 unexpected: odd"),
    "shape": (lambda f: rewrite(f, lambda t: t.update({NORM: t[NORM][1:]})), f"{NORM} is (63,)"),
    "cut": (cut, "bytes, checkpoint.json says"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
    "format": (lambda f: described(f, lambda d: d.update(format=9)), "has format 9"),
    "key": (lambda f: described(f, lambda d: d.update(odd=1)), "unknown keys: odd"),
    "model": (lambda f: described(f, lambda d: d["model"].pop("lm")), "lacks: lm"),
    "kind": (lambda f: described(f, lambda d: d["model"]["lm"].update(kind="rnn")), "rnn"),
    "outside": (
        lambda f: described(f, lambda d: d["files"].update({"../a": d["files"]["tokenizer.json"]})),
        "outside the folder",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    damage, reason = DAMAGE[name]
    folder = save(tmp_path / "saved", llava())
    damage(folder)
    with pytest.raises((CheckpointError, ConfigError)) as refused:
        systems.load(folder, Options())
    assert reason in refused.value.message


@pytest.mark.parametrize("options", [
    Options(system="mlcd"), Options(base=LLAVA), Options(vision_tower=LLAVA),
    Options(ignore_keys=("a",)),
])  # fmt: skip
def test_options_of_published_checkpoints_are_refused(options: Options, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", llava())
    with pytest.raises(ConfigError, match="trained checkpoint"):
        systems.load(folder, options)


def test_the_context_can_be_shortened(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", llava())
    assert systems.load(folder, Options(max_context=64)).model.lm.config.context == 64


def test_tensors_of_another_model_are_refused_before_a_file_is_written(tmp_path: Path) -> None:
    source = llava()
    lm = {k: v for k, v in source.weights["lm"].items() if k != "norm.weight"}
    weights = {**source.weights, "lm": lm}
    with pytest.raises(CheckpointError, match=r"lacks lm\.norm\.weight"):
        trained.write(tmp_path / "s", source.model, source.tokenizer, weights, **FACTS)
    assert list(tmp_path.iterdir()) == []


def test_inspect_tells_how_it_was_trained(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", llava(), dtype="bf16")
    data, lines = api.inspect(folder)
    assert data["training"] == {"stage": "projector", "steps": 3}
    assert data["system"] == "llava"
    assert "training: stage projector, steps 3" in lines
    shutil.rmtree(folder)
