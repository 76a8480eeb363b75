"""Packed linears of GPTQ and AWQ: the values that they stand for, their codes, and bad ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgevlm.toolkit.checkpoints import packed
from edgevlm.toolkit.checkpoints.weights import Checkpoint, Recipes
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.models.recipes import flip, keep
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.coded import Codes
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule
from tests import packed as published
from tests.packed import Kind
from tests.toolkit.checkpoints.memory import Memory

KINDS = {
    "gptq": Kind(),
    "gptq of 8 bits": Kind(bits=8),
    "gptq with zero points": Kind(symmetric=False),
    "gptq_v2 with zero points": Kind(symmetric=False, v2=True),
    "gptq_v2 of 8 bits with zero points": Kind(bits=8, symmetric=False, v2=True),
    "gptq in one group": Kind(group=-1),
    "gptq in large groups": Kind(group=256),
    "gptq in groups of 48": Kind(group=48),
    "gptq by activations": Kind(desc_act=True),
    "gptq by activations in 8 bits with zero points": Kind(
        bits=8, symmetric=False, v2=True, desc_act=True
    ),
    "gptq by activations with zero points": Kind(symmetric=False, desc_act=True, group=16),
    "awq": Kind("awq"),
    "awq in groups of 128": Kind("awq", group=128),
    "awq in one group": Kind("awq", group=-1),
}
SIZES = [(384, 8), (96, 24), (160, 16), (48, 16), (24, 8)]


def opened(kind: Kind, tensors: dict[str, Array]) -> Checkpoint:
    stored = Memory(tensors)
    packing = packed.read(kind.config(), "config.json")
    return packed.unpacked(Checkpoint(dict.fromkeys(tensors, stored), "folder"), packing)


def of(made: published.Linear, name: str = "a") -> dict[str, Array]:
    return {f"{name}.{part}": tensor for part, tensor in made.tensors.items()}


def codes_of(checkpoint: Checkpoint, key: str = "a.weight") -> Codes:
    found = checkpoint.codes(key)
    assert found is not None
    return found


def integers(found: Codes) -> tuple[Array, Array]:
    """Codes [inputs, outputs] and zero points of each input, as they were before packing."""
    bits = found.storage.bits
    columns = found.codes if bits == 8 else blockwise.unpack(found.codes)
    zeros: Array = np.full(found.scales.shape, blockwise.ZERO_POINT[bits])
    if found.zero_points is not None:
        zeros = found.zero_points if bits == 8 else blockwise.unpack(found.zero_points)
    each = np.repeat(zeros, columns.shape[1] // zeros.shape[1], 1)
    if found.order is not None:
        columns = blockwise.inputs_of(columns, found.order)
        each = blockwise.inputs_of(each, found.order)
    return columns.T, each.T


# -- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", KINDS)
def test_values_are_exact(name: str, sizes: tuple[int, int]) -> None:
    kind = KINDS[name]
    made = published.linear(*sizes, kind)
    checkpoint = opened(kind, of(made))
    assert checkpoint.keys() == ["a.weight"]
    assert checkpoint.shape("a.weight") == made.weight.shape
    assert checkpoint.dtype("a.weight") == "fp32"
    np.testing.assert_array_equal(checkpoint.read("a.weight"), made.weight)
    found = checkpoint.codes("a.weight")
    storage = checkpoint.packed["a.weight"]
    if found is None:  # nothing is lost: the weight stays in float
        assert storage.block_in(sizes[0]) is None
        return
    np.testing.assert_array_equal(found.floats().T, made.weight)
    np.testing.assert_array_equal(integers(found)[0], made.codes)
    assert found.fit(storage)


def test_which_weights_have_no_block() -> None:
    four, eight = (replace(blockwise.LINEAR[bits], zero_points=True) for bits in (4, 8))
    assert [four.block_in(n) for n in (896, 3584, 160, 48, 33)] == [64, 128, 16, None, None]
    assert [eight.block_in(n) for n in (896, 3584, 160, 48)] == [128, 128, 32, 16]


@pytest.mark.parametrize(
    ("group", "inputs", "block"),
    [(-1, 384, 128), (256, 384, 128), (48, 96, 16), (32, 96, 32), (128, 160, 32), (64, 896, 64)],
)
def test_blocks_are_whole_parts_of_groups(group: int, inputs: int, block: int) -> None:
    kind = Kind(group=group)
    found = codes_of(opened(kind, of(published.linear(inputs, 8, kind))))
    assert found.scales.shape == (8, inputs // block)
    assert found.zero_points is None


def test_zero_points_are_those_of_the_groups() -> None:
    kind = KINDS["awq"]
    made = published.linear(96, 24, kind)
    _, zeros = integers(codes_of(opened(kind, of(made))))
    np.testing.assert_array_equal(zeros, np.repeat(made.zeros, 32, 0))


def test_tensors_are_read_when_they_are_used() -> None:
    stored = Memory(of(published.linear(64, 8, Kind())) | of(published.linear(64, 8, Kind()), "b"))
    packing = packed.read(Kind().config(), "config.json")
    checkpoint = packed.unpacked(Checkpoint(dict.fromkeys(stored.tensors, stored), "f"), packing)
    assert not [key for key in stored.seen if key.endswith("scales")]
    checkpoint.codes("a.weight")
    assert not [key for key in stored.seen if key.startswith("b.") and key.endswith("scales")]
    before = len(stored.seen)
    assert checkpoint.codes("a.weight") is checkpoint.codes("a.weight")
    assert len(stored.seen) == before


def test_a_word_that_a_person_packed() -> None:
    """Eight inputs of one output: codes 0 to 7 are 0x76543210. AWQ's eight outputs likewise."""
    gptq: dict[str, Array] = {
        "a.qweight": np.asarray([[0x76543210] * 8] * 2, np.int32),
        "a.qzeros": np.asarray([[0x77777777]], np.int32),
        "a.scales": np.ones((1, 8), np.float16),
    }
    found = opened(Kind(group=-1), gptq).read("a.weight")
    np.testing.assert_array_equal(found, np.tile(np.arange(-8, 0), (8, 2)))
    awq: dict[str, Array] = {
        "a.qweight": np.asarray([[0x75316420]] * 16, np.int32),  # outputs 0 2 4 6 1 3 5 7
        "a.qzeros": np.asarray([[0]], np.int32),
        "a.scales": np.ones((1, 8), np.float16),
    }
    found = opened(Kind("awq", group=-1), awq).read("a.weight")
    np.testing.assert_array_equal(found, np.tile(np.arange(8)[:, None], (1, 16)))


# -- recipes and plans -------------------------------------------------------------------------


def test_the_plan_names_what_is_packed() -> None:
    kind = Kind(group=64)
    tensors = of(published.linear(64, 8, kind), "one") | of(published.linear(24, 8, kind), "odd")
    tensors |= of(published.linear(64, 8, kind), "out")
    tensors |= {"two.weight": np.ones((8, 64), np.float32), "norm": np.ones(8, np.float32)}
    table = {
        "layers.0.mlp.up.weight": flip("one.weight"),
        "layers.0.mlp.down.weight": flip("two.weight"),
        "layers.1.mlp.up.weight": flip("odd.weight"),
        "head.weight": flip("out.weight"),
        "norm.weight": keep("norm"),
    }
    weights = Recipes(table, opened(kind, tensors))
    plan = packed.plan("lm", weights, packed.read(kind.config(), "c"))
    assert plan == PrecisionPlan(
        rules=(
            Rule("lm/layers.*", "int4_weights", 64),
            Rule("lm/head", "int4_weights", 64),
            Rule("lm/layers.0/mlp/down", "float"),
            Rule("lm/layers.1/mlp/up", "float"),
        ),
        method="gptq checkpoint",
    )
    assert weights.codes("layers.0.mlp.up.weight") is not None
    assert weights.codes("layers.1.mlp.up.weight") is None  # 24 inputs have no block
    assert weights.codes("layers.0.mlp.down.weight") is None
    assert weights.codes("norm.weight") is None
    np.testing.assert_array_equal(weights["layers.0.mlp.down.weight"], np.ones((64, 8)))


def test_biases_of_zeros_may_stay_unread() -> None:
    tensors = of(published.linear(64, 8, Kind())) | of(published.linear(64, 8, Kind()), "b")
    tensors |= {"a.bias": np.zeros(8, np.float16), "b.bias": np.ones(8, np.float16)}
    checkpoint = opened(Kind(), tensors)
    assert checkpoint.idle == ("a.bias",)
    assert set(checkpoint.keys()) == {"a.weight", "b.weight", "a.bias", "b.bias"}


# -- refused -----------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[Kind, dict[str, Any], str]] = {
    "3 bits": (Kind(), {"bits": 3}, "bits = '3'"),
    "2 bits": (Kind(), {"bits": 2}, "bits = '2'"),
    "bits as text": (Kind(), {"bits": "4"}, "bits = '4'"),
    "awq of 8 bits": (Kind("awq"), {"bits": 8}, "bits = '8'"),
    "awq for gemv": (Kind("awq"), {"version": "gemv"}, "'gemv'"),
    "awq for fast gemv": (Kind("awq"), {"version": "GEMV_FAST"}, "'GEMV_FAST'"),
    "awq for marlin": (Kind("awq"), {"version": "marlin"}, "'marlin'"),
    "awq without zero points": (Kind("awq"), {"zero_point": False}, "zero_point"),
    "gptq for marlin": (Kind(), {"checkpoint_format": "marlin"}, "'marlin'"),
    "gptq that was made for marlin": (Kind(), {"is_marlin_format": True}, "is_marlin_format"),
    "two formats": (Kind(), {"format": "gptq_v2"}, "'gptq, gptq_v2'"),
    "words of 16 bits": (Kind(), {"pack_dtype": "int16"}, "'int16'"),
    "small groups": (Kind(), {"group_size": 8}, "group_size = '8'"),
    "odd groups": (Kind(), {"group_size": 0}, "group_size = '0'"),
    "modules of other bits": (Kind(), {"dynamic": {"+:.*down": {"bits": 8}}}, "dynamic"),
    "an unknown key": (Kind(), {"rotation": "hadamard"}, "rotation"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_formats_are_refused(name: str) -> None:
    kind, changes, reason = CONFIGS[name]
    with pytest.raises(ConfigError) as refused:
        packed.read(kind.config() | changes, "config.json")
    assert reason in refused.value.message
    assert "config.json: quantization_config" in refused.value.message
    assert refused.value.hint


def test_what_changes_nothing_is_read() -> None:
    plain = packed.read(Kind().config(), "c")
    more = {"meta": {"quantizer": ["gptqmodel:2.0"]}, "pack_dtype": "int32", "lm_head": False}
    more |= {"format": "gptq", "dynamic": {"-:.*vision.*": {}}, "desc_act": False, "rotation": None}
    assert packed.read(Kind().config() | more, "c", ["rotation"]) == plain
    assert packed.read(Kind("awq").config() | {"version": "GEMM"}, "c").method == "awq"
    short = packed.read({"quant_method": "awq"}, "c")
    assert short == packed.Packing("awq", 4, 128, True, False)
    assert str(short) == "awq, 4 bits, groups of 128"


def broken(part: str, change: Any) -> dict[str, Array]:
    tensors = of(published.linear(64, 16, Kind()))
    tensors[f"a.{part}"] = change(tensors[f"a.{part}"])
    return tensors


def swapped(order: Array) -> Array:
    return np.concatenate([order[32:], order[:32]])


TENSORS: dict[str, tuple[dict[str, Array], str, str]] = {
    "cut scales": (broken("scales", lambda x: x[:1]), "a.scales is (1, 16)", "fetch both"),
    "cut zero points": (broken("qzeros", lambda x: x[:, :1]), "a.qzeros is (2, 1)", "fetch both"),
    "flat codes": (broken("qweight", lambda x: x.reshape(-1)), "a.qweight and what", "fetch"),
    "scales that are no numbers": (broken("scales", lambda x: x * np.nan), "a.scales", "fetch"),
    "whole scales": (broken("scales", lambda x: x.astype(np.int32)), "a.scales", "fetch"),
    "codes of 64 bits": (broken("qweight", lambda x: x.astype(np.int64)), "int32", "fetch"),
    "other zero points": (broken("qzeros", lambda x: x - 1), "than 8", '"sym": false'),
    "groups in another order": (broken("g_idx", swapped), "desc_act", '"desc_act": true'),
    "groups that are not whole": (broken("g_idx", lambda x: x * 0), "a.g_idx does not", "fetch"),
    "a plain weight too": (broken("scales", lambda x: x) | {"a.weight": np.ones((16, 64))},
                           "twice", ""),
    "nothing packed": ({"a.weight": np.ones((16, 64))}, "no packed weights", "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_broken_tensors_are_refused(name: str) -> None:
    tensors, reason, hint = TENSORS[name]
    with pytest.raises(CheckpointError) as refused:
        opened(Kind(), tensors).read("a.weight")
    assert reason in refused.value.message
    assert hint in refused.value.hint


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx"])
def test_missing_tensors_are_named(part: str) -> None:
    kind = KINDS["gptq by activations"]
    tensors = of(published.linear(64, 16, kind))
    del tensors[f"a.{part}"]
    with pytest.raises(CheckpointError, match=f"a.{part} is missing"):
        opened(kind, tensors)


def test_older_files_have_no_order() -> None:
    made = published.linear(64, 16, Kind())
    tensors = of(made)
    del tensors["a.g_idx"]
    np.testing.assert_array_equal(opened(Kind(), tensors).read("a.weight"), made.weight)


def test_a_zero_point_of_0_in_the_first_format_is_refused() -> None:
    """AutoGPTQ and GPTQModel store and read it differently."""
    kind = Kind(symmetric=False)
    tensors = of(published.linear(64, 16, kind))
    tensors["a.qzeros"] |= 15
    with pytest.raises(CheckpointError, match="zero points of 0") as refused:
        opened(kind, tensors).codes("a.weight")
    assert "gptq_v2" in refused.value.hint
