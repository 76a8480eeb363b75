"""Golden checkpoints stored in other ways (shards, torch files, folders) give the same tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgevlm.engines.backends import sessions
from edgevlm.engines.build.check import TOLERANCE
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import CheckpointError, ConfigError, ToolkitError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.vlm.components import zero_states
from tests.conftest import golden_case
from tests.pipeline import ask, engine_of
from tests.systems.test_original_goldens import Golden

CASES = ["e2e_llava15", "e2e_convllava", "e2e_mmfuser"]


def copied(name: str, work: Path) -> tuple[Golden, Path]:
    """A golden case copied below `work`; its checkpoint folder there."""
    shutil.copytree(golden_case(name), work / "case")
    for path in (work / "case").rglob("*"):
        path.chmod(0o755)
    golden = Golden(work / "case")
    return golden, golden.checkpoint


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of all shards; the weight files are removed."""
    found: dict[str, torch.Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        found |= load_file(file)
        file.unlink()
    (checkpoint / "model.safetensors.index.json").unlink(missing_ok=True)
    return found


def reshard(checkpoint: Path, count: int) -> None:
    tensors = tensors_of(checkpoint)
    names, where = sorted(tensors), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        mine = names[number::count]
        save_file({n: tensors[n] for n in mine}, checkpoint / file)
        where.update(dict.fromkeys(mine, file))
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def one_file(checkpoint: Path) -> None:
    save_file(tensors_of(checkpoint), checkpoint / "model.safetensors")


def torch_file(checkpoint: Path) -> None:
    torch.save(tensors_of(checkpoint), checkpoint / "pytorch_model.bin")


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def tower_inside(checkpoint: Path) -> None:
    name = json.loads((checkpoint / "config.json").read_text())["mm_vision_tower"]
    shutil.move(checkpoint.parent / name, checkpoint / "tower")
    edit(checkpoint, lambda c: c.update(mm_vision_tower="tower"))


def layer_as_text(checkpoint: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        raw = config["mm_vision_select_layer"]
        text = "list" + "/".join(map(str, raw)) if isinstance(raw, list) else str(raw)
        config["mm_vision_select_layer"] = text

    edit(checkpoint, change)


WAYS: dict[str, Callable[[Path], None]] = {
    "five shards": lambda c: reshard(c, 5),
    "one file": one_file,
    "a torch file": torch_file,
    "tower inside": tower_inside,
    "layer as text": layer_as_text,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_the_way_of_storing_does_not_change_the_answer(name: str, way: str, tmp_path: Path) -> None:
    golden, checkpoint = copied(name, tmp_path)
    WAYS[way](checkpoint)
    answer = ask(engine_of(checkpoint, tmp_path), golden.case["prompt"], [golden.image])
    assert list(answer.token_ids) == golden.outputs["greedy_ids"].reshape(-1).tolist()


def test_mmfuser_ignores_levels_between_as_the_original_does(tmp_path: Path) -> None:
    golden, checkpoint = copied("e2e_mmfuser", tmp_path)

    def change(config: dict[str, Any]) -> None:
        *values, query = config["mm_vision_select_layer"]
        config["mm_vision_select_layer"] = [*values, 0, -1, query]

    edit(checkpoint, change)
    answer = ask(engine_of(checkpoint, tmp_path), golden.case["prompt"], [golden.image])
    assert list(answer.token_ids) == golden.outputs["greedy_ids"].reshape(-1).tolist()


def test_a_bundle_is_recorded_again_from_itself(tmp_path: Path) -> None:
    golden, checkpoint = copied("e2e_mmfuser", tmp_path)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    engine_of(checkpoint, tmp_path / "first")
    shutil.rmtree(tmp_path / "case" / golden.checkpoint.name)
    engine = engine_of(tmp_path / "first" / "bundle", tmp_path / "second")
    answer = ask(engine, golden.case["prompt"], [golden.image])
    assert list(answer.token_ids) == golden.outputs["greedy_ids"].reshape(-1).tolist()


@pytest.mark.parametrize("name", CASES)
def test_the_unlowered_bundle_reproduces_its_goldens_in_plain_onnx_runtime(
    name: str, tmp_path: Path
) -> None:
    _, checkpoint = copied(name, tmp_path)
    engine_of(checkpoint, tmp_path)
    for actual, expected in replayed(Bundle.open(tmp_path / "bundle")):
        assert goldens.relative_difference(actual, expected) < TOLERANCE["fp32"]


def replayed(bundle: Bundle) -> Iterator[tuple[Array, Array]]:
    """Every golden output, and that of the unlowered graph in plain ONNX Runtime."""
    states: dict[str, dict[str, Any]] = {}
    for golden in goldens.load(bundle.path / "golden.npz"):
        record = bundle.manifest.component(golden.component)
        session = sessions.open_session(bundle.path / record.graph)
        own = states.setdefault(
            record.name, dict(zero_states(record.inputs, record.outputs, goldens.AXES))
        )
        names = [o.name for o in session.get_outputs()]
        found = dict(zip(names, session.run(names, {**golden.inputs, **own}), strict=True))
        own.update({p.updates: found[p.name] for p in record.outputs if p.updates})
        for output, expected in golden.outputs.items():
            yield found[output].reshape(-1)[goldens.sample(found[output].size)], expected


# -- almost a known system: refused, with what was found and what is supported -------------------


def refused(checkpoint: Path) -> ToolkitError:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        systems.load(checkpoint, Options())
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("name", CASES)
def test_an_extra_tensor_is_refused(name: str, tmp_path: Path) -> None:
    _, checkpoint = copied(name, tmp_path)
    tensors = tensors_of(checkpoint)
    tensors["model.adapter.weight"] = torch.zeros(3)
    save_file(tensors, checkpoint / "model.safetensors")
    assert "model.adapter.weight" in refused(checkpoint).message


@pytest.mark.parametrize("projector", ["honeybee", "mlp2x_relu", "mlp0x_gelu"])
def test_a_projector_that_we_lack_is_refused(projector: str, tmp_path: Path) -> None:
    _, checkpoint = copied("e2e_llava15", tmp_path)
    edit(checkpoint, lambda c: c.update(mm_projector_type=projector))
    error = refused(checkpoint)
    assert projector in error.message
    assert "mlp{N}x_gelu" in error.hint


def test_a_tower_that_we_lack_is_refused(tmp_path: Path) -> None:
    golden, checkpoint = copied("e2e_llava15", tmp_path)
    tower = golden.checkpoint.parent / golden.case["vision_tower"]
    edit(tower, lambda c: c.update(model_type="eva_vision_model"))
    error = refused(checkpoint)
    assert "eva_vision_model" in error.message
    assert "clip_vision_model" in error.hint


def test_a_fuser_without_its_levels_is_refused(tmp_path: Path) -> None:
    _, checkpoint = copied("e2e_mmfuser", tmp_path)
    edit(checkpoint, lambda c: c.update(mm_vision_select_layer=[-3, -2]))
    assert "needs 5" in refused(checkpoint).message
    edit(checkpoint, lambda c: c.update(mm_vision_select_layer=-2))
    assert "mm_projector.0" in refused(checkpoint).message


def test_an_ambiguous_folder_names_its_candidates(tmp_path: Path) -> None:
    golden, checkpoint = copied("e2e_mmfuser", tmp_path)
    shutil.move(checkpoint.parent / golden.case["vision_tower"], checkpoint.parent / "mlcd-tower")
    edit(checkpoint, lambda c: c.update(mm_vision_tower="mlcd-tower"))
    error = refused(checkpoint)
    assert "mlcd, mmfuser" in error.message
    assert "--system" in error.hint
    source = systems.load(checkpoint, Options(system="mmfuser"))
    assert source.model.system == "mmfuser"
