"""NVIDIA's parser and builder take every op that our models use, in three number formats, for every
kind of card that has them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from benchmarks import rtx_bytes
from edgevlm.engines.backends.tensorrt import builder, kernels, probes
from edgevlm.engines.backends.tensorrt.builder import Job
from edgevlm.engines.backends.tensorrt.flavours import RTX
from edgevlm.engines.lowering.lower import lower
from edgevlm.export.write import record
from edgevlm.toolkit.checkpoints.safetensors_io import Entry, Written
from edgevlm.toolkit.target import Target
from tests.ops_cases import CASES, Case

CARDS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120")
ELEMENTS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FP8_CARDS = ("sm_89", "sm_120")
# Heads of 12 channels: Myelin fails on them in fp16 and bf16 (a CHECK of its tiled layouts).
BROKEN = {("attention_cached heads of any width", dtype) for dtype in ("fp16", "bf16")}
# Before 1.5 a builder without a card cannot round.
ROUNDING = ("fake_quant", "fake_quant per channel", "fake_quant to fp8")
NEEDS_A_CARD = ROUNDING if RTX.installed() < (1, 5) else ()


def cards_of(name: str, dtype: str) -> tuple[str, ...]:
    """Those that have the number formats of a case: sm_75 has no bf16, and no products in fp32."""
    if "fp8" in name:
        return FP8_CARDS
    return CARDS if dtype == "fp16" else CARDS[1:]


def graph_of(case: Case, dtype: str, target: Target) -> onnx.ModelProto:
    """A case in `dtype`, lowered, with fixed shapes and its weights inside."""
    recorded = record(case.component(), dtype)
    values = {**case.weights(), **recorded.ops.constants}
    kinds = {name: "fp32" if name in recorded.ops.constants else dtype for name in values}
    entries = {name: Entry(kinds[name], value.shape, 0) for name, value in values.items()}
    model = recorded.model("weights", Written(entries, "", 0))
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.CopyFrom(_stored(values[tensor.name], tensor.name, kinds[tensor.name]))
    feed, outputs = case.feed(), case.outputs()
    for port in [*model.graph.input, *model.graph.output]:
        shape = (feed if port.name in feed else outputs)[port.name].shape
        for dim, size in zip(port.type.tensor_type.shape.dim, shape, strict=True):
            dim.dim_value = size
    return lower(model, target)


def _stored(value: np.ndarray[Any, Any], name: str, dtype: str) -> TensorProto:
    if dtype == "bf16":
        flat = value.astype(np.float32).reshape(-1).tolist()
        return onnx.helper.make_tensor(name, ELEMENTS[dtype], value.shape, flat)
    kind = np.float16 if dtype == "fp16" else np.float32
    return numpy_helper.from_array(value.astype(kind), name)


def job(graph: Path, cards: tuple[str, ...]) -> dict[str, Any]:
    names = [card.replace("_", "").upper() for card in cards]
    return asdict(Job("tensorrt_rtx_bindings", str(graph), str(graph) + ".plan", [], names, 0, ""))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], dict[str, Any]]:
    """The builder's result of every case in every number format, made in one process."""
    folder = tmp_path_factory.mktemp("ops")
    jobs: list[dict[str, Any]] = []
    keys: list[tuple[str, str]] = []
    for name, case in sorted(CASES.items()):
        for dtype in ELEMENTS:
            graph = folder / f"{len(jobs)}.onnx"
            cards = cards_of(name, dtype)
            target = Target("tensorrt-rtx", RTX.installed()[:2], "+".join(cards))
            graph.write_bytes(graph_of(case, dtype, target).SerializeToString())
            jobs.append(job(graph, cards))
            keys.append((name, dtype))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([sys.executable, "-m", "tests.rtx.many", str(folder)], check=True)
    return dict(zip(keys, json.loads((folder / "results.json").read_text()), strict=True))


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_op_becomes_an_engine(
    name: str, dtype: str, built: Mapping[tuple[str, str], dict[str, Any]]
) -> None:
    result = built[name, dtype]
    assert result["parsed"], result["errors"]
    if name in NEEDS_A_CARD:
        assert "Cuda Runtime" in result["errors"][0]
    elif (name, dtype) in BROKEN:
        assert "CHECK" in result["errors"][0]
    else:
        assert result["plan_bytes"] > 0, result["errors"]


def test_the_product_that_measures_fp8_is_computed_in_it(tmp_path: Path) -> None:
    for kind, cards in (("fp8", FP8_CARDS), ("int8", ("sm_89",))):
        graph = tmp_path / f"{kind}.onnx"
        graph.write_bytes(probes.product(kind, 256).SerializeToString())
        made = Job(**job(graph, cards))
        builder.build(kind, made, tmp_path)
        found = kernels.read((tmp_path / "build.log").read_text())
        named = {"fp8": "FP8", "int8": "Int8"}[kind]
        assert [k.kind for k in found if named in k.types and k.kind == "gemm"] == ["gemm"]


def test_a_residual_beside_a_convolution_is_written_once(tmp_path: Path) -> None:
    """Of two blocks of ConvNeXt, that of the first: it reads two tensors and writes one."""
    found = rtx_bytes.built(rtx_bytes.blocks(2, 64, 16), "fp16", "sm_89", tmp_path)
    one = 2 * 64 * 16 * 16
    sums = [k for k in found if any(node.endswith("/Add") for node in k["nodes"])]
    assert [k["moved_bytes"] for k in sums] == [3 * one, 3 * one]
    convolved = [k for k in found if k["kind"] == "correlation"]
    assert all(2 * one < k["moved_bytes"] < 2.5 * one for k in convolved)


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_deformable_attention_is_two_kernels(
    dtype: str, built: Mapping[tuple[str, str], dict[str, Any]]
) -> None:
    """Where to sample, and all else; its body as it stands would be six for one level."""
    for name in ("ms_deform_attn", "ms_deform_attn, one level"):
        assert len(kernels.read(built[name, dtype]["log"])) == 2


def test_attention_has_kernels_of_its_own_where_heads_are_wide_enough(
    built: Mapping[tuple[str, str], dict[str, Any]],
) -> None:
    def attends(name: str, dtype: str) -> bool:
        return any(kernel.attends for kernel in kernels.read(built[name, dtype]["log"]))

    assert attends("attention_cached prompt", "fp16")  # heads of 16 channels
    assert attends("attention_cached heads of 8n", "bf16")  # of 24
    assert not attends("attention", "fp16")  # of 8: no kernel
    assert not attends("attention_cached prompt", "fp32")  # no kernel for prompts in fp32
