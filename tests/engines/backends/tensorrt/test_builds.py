"""What the builder is told on a machine with a card: memory, and what was timed before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgevlm import api
from edgevlm.engines import backends, manifest
from edgevlm.engines.backends import Shapes
from edgevlm.engines.backends.tensorrt import builder, device, kernels, probes
from edgevlm.engines.backends.tensorrt.device import CardFacts
from edgevlm.toolkit.target import Target, has_fp8
from tests.engines.backends.tensorrt.conftest import GOLDEN, Built, Install

ORIN = CardFacts("Orin (nvgpu)", "12.6", 8 << 30, shared=True)


def header(plan: Path) -> dict[str, object]:
    data = plan.read_bytes()
    size = int.from_bytes(data[4:8], "little")
    return dict(json.loads(data[8 : 8 + size]))


@pytest.mark.parametrize("release", ["10.3.0", "10.16.1.11", "11.4.0.106", "rtx-1.4.0.76"])
def test_attention_may_be_decomposed_in_every_release(release: str, built: Built) -> None:
    made = header(built(release) / "lm.plan")
    assert made["decomposable"] == made["attentions"]
    assert bool(made["attentions"]) == (release != "10.3.0")
    profiles = made["profiles"]
    assert isinstance(profiles, list)
    assert [p["ids"] for p in profiles] == [
        *([[1, 1], [1, 256]], [[1, 1], [1, 1]]),
        [[2, 1], [8, 1]],  # sequences side by side
    ]
    plan = manifest.read(built(release)).plans["lm"]
    assert (plan.profiles, plan.rows) == (3, 8)


def test_timings_and_memory(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = install("10.3.0")
    monkeypatch.setattr(device, "facts", lambda number=0: ORIN)
    bundle, engine = tmp_path / "bundle", tmp_path / "engine"
    api.export_bundle(GOLDEN / "llava-v1.5-tiny", bundle, dtype="fp32")
    api.build_engine(bundle, engine, target=str(machine.target))
    assert header(engine / "lm.plan")["limit"] == 2 << 30
    kept = list((tmp_path / "cache/edgevlm/timing").iterdir())
    assert [file.name for file in kept] == ["tensorrt-10.3.0-sm-87-Orin-nvgpu-cuda-12.6.cache"]
    assert kept[0].read_text() == "10.3.0 encoder.clip merger lm"  # each began where one ended
    kept[0].write_text("9.9.9 of another release")
    api.build_engine(bundle, tmp_path / "again", target=str(machine.target))
    assert kept[0].read_text() == "10.3.0 encoder.clip merger lm"


def test_a_card_with_memory_of_its_own_gives_half() -> None:
    assert CardFacts("H100", "13.0", 80 << 30, shared=False).workspace_bytes == 40 << 30
    here = Target("tensorrt", (10, 3, 0), "sm_87")
    files = {builder.timing_cache(here, f) for f in (ORIN, CardFacts("H100", "13.0", 1, False))}
    assert len(files) == 2


def test_without_a_driver_nothing_is_known() -> None:
    if device.architecture() is None:
        assert device.facts() is None


_INPUT = "{ Name: x, Dimensions: [%s,8], Strides: [8,1], Datatype: Half, Format: (Linear) }"
LISTED = f"""VERBOSE Layers:
Name: __myl_MulAdd_myl0_3, LayerType: kgen, Inputs: [ {_INPUT % 2}], Constants: [ \
{{ Name: w, Dimensions: [8], Strides: [1], Datatype: Float, Format: (Linear) }}, \
{{ Name: c, Dimensions: [3], Strides: [1], Datatype: Int4, Format: (Linear) }}], Outputs: [ \
{{ Name: y, Dimensions: [2,8], Datatype: BFloat16, Format: (Linear) }}], TacticName: \
[Dimensions: [9] Datatype: Half], StreamId: 0, Metadata: [ONNX Layer: lm/a][ONNX Layer: lm/b]
Name: __myl_Add_myl0_4, LayerType: kgen, Inputs: [ {_INPUT % -1}], Constants: [], Outputs: [ ], \
TacticName: , StreamId: 0, Metadata: [ONNX Layer: lm/c]
"""


def test_what_a_kernel_moves_is_read_from_the_builders_listing() -> None:
    first, second = kernels.read(LISTED)
    assert (first.name, first.kind, first.nodes) == ("__myl_MulAdd", "kgen", ("lm/a", "lm/b"))
    assert first.moved_bytes == 32 + 32 + round(1.5) + 32
    assert second.moved_bytes == 0  # its size depends on the call


def test_rtx_shares_weights_between_profiles_as_long_as_they_are_floats() -> None:
    """It would store codes once more for several sequences: 1.8 times the plan."""
    alone, several = {"batch": (1, 1, 1), "sequence": (1, 8, 8)}, {"batch": (2, 8, 8)}
    whole = Shapes(16, (alone, several))
    for kind, profiles in (("FLOAT16", 2), ("INT4", 1), ("INT8", 1), ("FLOAT8E4M3FN", 1)):
        held = onnx.TensorProto(name="w", data_type=onnx.TensorProto.DataType.Value(kind))
        graph = onnx.helper.make_graph([], "lm", [], [], [held])
        held.data_location = onnx.TensorProto.EXTERNAL
        assert builder.sharing(whole, _model(graph)) == whole  # a scale, a zero point
        graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
        found = builder.sharing(whole, _model(graph))
        assert len(found.profiles) == profiles
        assert builder.most_rows(found) == (8 if profiles > 1 else 1)


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    return onnx.helper.make_model(graph)


@pytest.mark.parametrize("release", ["10.3.0", "rtx-1.7.1.116"])
def test_a_card_is_measured(
    release: str, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = install(release)
    monkeypatch.setattr(probes, "_SIDE", 64)
    monkeypatch.setattr(probes, "_BYTES", 100_000)
    found = backends.backend(machine.target).peaks(Path("nowhere"))
    assert min(found.gflop_s, found.int8_gop_s, found.gb_s) > 0
    formats = 3 if has_fp8(machine.target.arch) else 2
    assert bool(found.fp8_gflop_s) == (formats == 3)
    names = machine.world.names()
    assert names.count("IExecutionContext.execute_async_v3") == formats * 21
    assert "copy in" not in names
    assert (machine.world.live, machine.world.streams) == (0, {})


def test_products_are_in_the_format_that_they_name() -> None:
    for kind, element in (("int8", onnx.TensorProto.INT8), ("fp8", onnx.TensorProto.FLOAT8E4M3FN)):
        graph = probes.product(kind, 32).graph
        assert {n.op_type for n in graph.node} == {"QuantizeLinear", "DequantizeLinear", "MatMul"}
        assert {t.data_type for t in graph.initializer if t.name != "scale"} == {element}
        codes = next(t for t in graph.initializer if t.name == "codes")
        assert np.isfinite(onnx.numpy_helper.to_array(codes).astype(np.float32)).all()
    assert [node.op_type for node in probes.product("fp16", 32).graph.node] == ["MatMul"]
