"""Weights by recipe, by shard and by seed, and checkpoints that do not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.checkpoints.weights import (
    Checkpoint,
    RandomWeights,
    Recipes,
    check_tables,
    open_checkpoint,
)
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.models.recipes import Recipe, flat, flip, keep
from edgevlm.toolkit.ops.vocabulary import Array
from tests.toolkit.checkpoints.memory import Memory

STORED = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.bias": np.arange(2, dtype=np.float32),
    "token": np.arange(4, dtype=np.float32).reshape(1, 1, 4),
}
TABLE = {"linear.weight": flip("a.weight"), "linear.bias": keep("a.bias"), "class": flat("token")}
SHAPES = {"linear.weight": (3, 2), "linear.bias": (2,), "class": (4,)}


def checkpoint(tensors: dict[str, Array]) -> Checkpoint:
    return Checkpoint(dict.fromkeys(tensors, Memory(tensors)), "folder")


# -- recipes -------------------------------------------------------------------------------


def test_a_recipe_makes_a_tensor() -> None:
    found = Recipes(TABLE, Memory(STORED))
    assert (list(found), len(found)) == (list(TABLE), 3)
    np.testing.assert_array_equal(found["linear.weight"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(found["linear.bias"], [0, 1])
    np.testing.assert_array_equal(found["class"], [0, 1, 2, 3])
    with pytest.raises(KeyError):
        _ = found["nothing"]


def test_tensors_are_read_when_they_are_used() -> None:
    source = Memory(STORED)
    found = Recipes(TABLE, source)
    assert source.seen == []
    _ = found["class"]
    assert source.seen == ["token"]


def test_a_recipe_of_several_tensors_below_a_prefix() -> None:
    both = Recipe(("a", "b"), lambda a, b: np.concatenate([a, b])).below("model.")
    assert both.sources == ("model.a", "model.b")
    source = Memory({"model.a": np.ones(1), "model.b": np.zeros(2)})
    np.testing.assert_array_equal(Recipes({"x": both}, source)["x"], [1, 0, 0])


def faults(tensors: dict[str, Array], unused: Sequence[str] = ()) -> str:
    with pytest.raises(CheckpointError) as refused:
        check_tables([(TABLE, SHAPES)], checkpoint(tensors), unused)
    return refused.value.message


def test_a_checkpoint_that_fits() -> None:
    check_tables([(TABLE, SHAPES)], checkpoint(STORED), ())
    spare = STORED | {"vision.extra.bias": np.zeros(1), "rotary.inv_freq": np.zeros(3)}
    check_tables([(TABLE, SHAPES)], checkpoint(spare), ("vision.*", "*.inv_freq"))


def test_every_kind_of_fault_is_counted_and_named() -> None:
    tensors: dict[str, Array] = {f"extra.{i}": np.zeros(1) for i in range(5)}
    tensors |= {"a.weight": np.zeros((4, 4)), "a.bias": np.zeros(3)}
    assert faults(tensors) == (
        "folder does not fit the model its config describes: 1 missing: token; "
        "5 unexpected: extra.0, extra.1, extra.2 and 2 more; "
        "2 mis-shaped: a.weight is (4, 4), expected (2, 3), a.bias is (3,), expected (2,)"
    )


def test_three_are_named_without_more() -> None:
    assert "3 missing: a.bias, a.weight, token" in faults({})
    assert "more" not in faults({})


def test_more_mis_shaped_tensors_than_are_named() -> None:
    many = {f"t{i}": keep(f"t{i}") for i in range(5)}
    stored: dict[str, Array] = {name: np.zeros(2) for name in many}
    with pytest.raises(CheckpointError, match=r"5 mis-shaped: t0 .* t1 .* t2 .* and 2 more"):
        check_tables([(many, dict.fromkeys(many, (3,)))], checkpoint(stored), ())


def test_globs_of_unused_tensors_do_not_excuse_a_missing_one() -> None:
    tensors = {k: v for k, v in STORED.items() if k != "token"}
    assert "1 missing: token" in faults(tensors, ["*"])


def test_tables_of_several_components_count_together() -> None:
    half = ({"x": keep("a.bias")}, {"x": (2,)}), ({"y": keep("a.weight")}, {"y": (2, 3)})
    check_tables(half, checkpoint({k: STORED[k] for k in ("a.bias", "a.weight")}), ())
    with pytest.raises(CheckpointError, match="1 unexpected: token"):
        check_tables(half, checkpoint(STORED), ())


# -- folders -------------------------------------------------------------------------------


def shards(folder: Path, shares: Sequence[dict[str, Array]], names: Any = None) -> None:
    where: dict[str, str] = {}
    for number, share in enumerate(shares):
        file = f"model-{number}.safetensors"
        save_file(share, folder / file)
        where |= dict.fromkeys(share, file)
    index = {"weight_map": where if names is None else names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_one_file_and_shards_hold_the_same(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    save_file(STORED, tmp_path / "one/model.safetensors")
    shards(tmp_path / "two", [{k: v} for k, v in STORED.items()])
    for name in ("one", "two"):
        found = open_checkpoint(tmp_path / name)
        assert sorted(found.keys()) == sorted(STORED)
        assert "token" in found
        assert "nothing" not in found
        for key, array in STORED.items():
            assert found.shape(key) == array.shape
            np.testing.assert_array_equal(found.read(key), array)


def test_a_missing_shard(tmp_path: Path) -> None:
    shards(tmp_path, [STORED], {"a": "model-0.safetensors", "b": "model-7.safetensors"})
    with pytest.raises(CheckpointError, match=r"do not exist: model-7\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    names = {"a": "model-0.safetensors", "b": "model-1.safetensors"}
    shards(tmp_path, [STORED, {"token": np.zeros(3, np.float32)}], names)
    with pytest.raises(CheckpointError, match="token is stored in two shards"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../elsewhere/x", "/dev/zero", "/dev/stdin", "/etc/passwd", "..", ".", "", "a/b", "a\0"],
)
def test_an_index_does_not_lead_out_of_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    save_file(STORED, tmp_path / "elsewhere/x")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shards(folder, [STORED], {"token": name})
    with pytest.raises(CheckpointError, match="which is no file of its folder"):
        open_checkpoint(folder)


def test_an_index_says_which_shard_has_what(tmp_path: Path) -> None:
    first, *others = STORED
    right = dict.fromkeys(STORED, "model-0.safetensors")
    lacking = {key: name for key, name in right.items() if key != first}
    for names, reason in (
        (right | {"nonsense": "model-0.safetensors"}, "nonsense is not in model-0"),
        (lacking, f"{first} is in model-0.safetensors, and the index does not name it"),
    ):
        shards(tmp_path, [STORED], names)
        with pytest.raises(CheckpointError, match=reason):
            open_checkpoint(tmp_path)
    shards(tmp_path, [STORED], right)
    assert sorted(open_checkpoint(tmp_path).keys()) == sorted(STORED)


def test_a_pipe_is_no_weights_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises((CheckpointError, ConfigError), match=r"index\.json"):
        open_checkpoint(tmp_path)


def test_folders_without_weights_and_without_torch(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="needs torch"):
        open_checkpoint(tmp_path)
    seen = open_checkpoint(tmp_path, lambda path: Memory({path.name: np.zeros(1)}))
    assert seen.keys() == ["pytorch_model.bin"]
    save_file(STORED, tmp_path / "model.safetensors")
    assert sorted(open_checkpoint(tmp_path, SafetensorsFile).keys()) == sorted(STORED)


# -- random weights ------------------------------------------------------------------------

RANDOM = {
    "embed.weight": (50, 16), "mlp.up.weight": (16, 33), "patch.weight": (8, 3, 5, 5),
    "norm.weight": (16,), "norm.bias": (16,), "class": (16,), "scale": (),
    "position.weight": (7, 16),
}  # fmt: skip


def test_random_weights_repeat_and_differ_by_name_seed_and_label() -> None:
    first, again = (RandomWeights(RANDOM, 3, "lm") for _ in range(2))
    assert (list(first), len(first)) == (list(RANDOM), len(RANDOM))
    for key, shape in RANDOM.items():
        assert first[key].shape == shape
        np.testing.assert_array_equal(first[key], again[key])
    twins = RandomWeights({"a": (9, 9), "b": (9, 9)}, 3, "lm")
    others = [RandomWeights({"a": (9, 9)}, *how) for how in ((4, "lm"), (3, "merger"))]
    for other in (twins["b"], *(o["a"] for o in others)):
        assert not np.array_equal(twins["a"], other)


@pytest.mark.parametrize("block", [1, 100, 1000, 1 << 26])
def test_random_weights_do_not_depend_on_the_size_of_a_block(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {key: RandomWeights(RANDOM, 3, "lm")[key] for key in RANDOM}
    monkeypatch.setattr("edgevlm.toolkit.checkpoints.weights.BLOCK_BYTES", block)
    weights = RandomWeights(RANDOM, 3, "lm")
    for key, array in expected.items():
        np.testing.assert_array_equal(weights[key], array)
    if block == 100:
        assert len(list(weights.blocks("embed.weight"))) == 50


def test_random_weights_keep_values_near_one() -> None:
    big = RandomWeights(
        {"up.weight": (256, 300), "conv.weight": (300, 8, 5, 5), "embed.weight": (300, 256)}, 0, "x"
    )
    assert big["up.weight"].var() == pytest.approx(1 / 256, rel=0.05)
    assert big["conv.weight"].var() == pytest.approx(1 / 200, rel=0.05)
    assert big["embed.weight"].var() == pytest.approx(1 / 256, rel=0.05)
    assert abs(big["up.weight"].mean()) < 1e-3
    small = RandomWeights(RANDOM, 0, "x")
    assert (small["norm.weight"] == 1).all()
    assert (small["norm.bias"] == 0).all()
