"""A component that is too large to be held is compared in pieces: the same answers, less memory."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edgevlm.engines import manifest
from edgevlm.engines.backends import RunnerOptions, onnxruntime, sessions
from edgevlm.engines.build import pieces
from edgevlm.engines.build.build import build
from edgevlm.engines.manifest import Engine
from edgevlm.engines.runtime import memory
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.goldens import AXES, Golden
from edgevlm.toolkit.bundle.manifest import GOLDENS
from edgevlm.toolkit.errors import AccuracyError, OutOfMemory
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import parse
from tests.pipeline import requantized, silent

LAYER = 30_000  # bytes of weights: less than one layer of the tiny language model in float


def calls_of(bundle: Path, component: str) -> list[Golden]:
    return [g for g in goldens.load(bundle / GOLDENS) if g.component == component]


def whole(folder: Path, engine: Engine, component: str, calls: list[Golden]) -> list[Any]:
    record = next(c for c in engine.components if c.name == component)
    options = RunnerOptions(context=AXES["context"])
    runner = onnxruntime.open(folder, record, engine.model, options)
    state = runner.new_state()
    found = [
        {name: np.array(x) for name, x in runner.run(golden.inputs, state).items()}
        for golden in calls
    ]
    runner.close()
    return found


def in_pieces(
    folder: Path, engine: Engine, component: str, calls: list[Golden], most: int, patch: Any
) -> list[dict[str, Array]]:
    patch.setattr(memory, "PIECE_BYTES", most)
    record = next(c for c in engine.components if c.name == component)
    return pieces.answers(folder, record, calls, AXES["context"])


def opened(patch: Any) -> list[int]:
    """The bytes of weights of every session that is opened from now on."""
    sizes, plain = list[int](), sessions.open_session

    def counted(model: Any, *args: Any) -> Any:
        if isinstance(model, bytes):
            graph = onnx.load_model_from_string(model).graph
            sizes.append(sum(pieces._nbytes(tensor) for tensor in graph.initializer))
        return plain(model, *args)

    patch.setattr(sessions, "open_session", counted)
    return sizes


@pytest.fixture(scope="module")
def in_int8(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pieces") / "engine"
    build(ready / "bundle", out, requantized(ready / "bundle", "int8-rows"), silent)
    return out


@pytest.mark.parametrize("component", ["encoder.clip", "lm"])
@pytest.mark.parametrize("most", [1, LAYER])
@pytest.mark.parametrize("form", ["float", "int8"])
def test_answers_are_those_of_the_whole(
    form: str,
    component: str,
    most: int,
    ready: Path,
    in_int8: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All calls of a decoder, which see the cache that the ones before left."""
    folder = in_int8 if form == "int8" else ready / "engine-cpu"
    engine, calls = manifest.read(folder), calls_of(ready / "bundle", component)
    expected = whole(folder, engine, component, calls)
    found = in_pieces(folder, engine, component, calls, most, monkeypatch)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, values in one.items():
            size = np.abs(other[name]).max()
            np.testing.assert_allclose(values, other[name], atol=2e-5 * size, rtol=0)


def test_weights_are_held_a_piece_at_a_time(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ready / "engine-cpu"
    stored, most = (folder / "lm.safetensors").stat().st_size, 300_000
    sizes = opened(monkeypatch)
    calls = calls_of(ready / "bundle", "lm")
    in_pieces(folder, manifest.read(folder), "lm", calls, most, monkeypatch)
    assert 3 <= len(sizes) <= 2 * -(-stored // most)
    assert max(sizes) <= most


def layered(layers: int) -> onnx.GraphProto:
    """x + relu(x A) B, so many times, each of 8,192 bytes of weights; all read a small table."""
    nodes, weights = list[onnx.NodeProto](), [helper.make_tensor("t", 1, [32], [0.0] * 32)]
    for i in range(layers):
        for name in (f"a{i}", f"b{i}"):
            tensor = onnx.TensorProto(name=name, dims=[32, 32], data_type=1)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="length", value="4096")
            weights.append(tensor)
        steps = (
            ("MatMul", (f"x{i}", f"a{i}"), f"h{i}"),
            ("Add", (f"h{i}", "t"), f"s{i}"),
            ("Relu", (f"s{i}",), f"r{i}"),
            ("MatMul", (f"r{i}", f"b{i}"), f"d{i}"),
            ("Add", (f"x{i}", f"d{i}"), f"x{i + 1}"),
        )
        nodes += [helper.make_node(op, read, [made]) for op, read, made in steps]
    ends = [helper.make_tensor_value_info(n, 1, [1, 32]) for n in ("x0", f"x{layers}")]
    return helper.make_graph(nodes, "layered", ends[:1], ends[1:], weights)


@pytest.mark.parametrize(("most", "sizes"), [(1, 8), (17_000, 4), (30_000, 3), (10**6, 1)])
def test_cuts_lie_between_layers(most: int, sizes: int) -> None:
    """Where the least crosses, if a piece can hold a layer."""
    graph = layered(8)
    found = pieces.cut(graph, most)
    assert [n.name for p in found for n in p.nodes] == [n.name for n in graph.node]
    assert [o for p in found for n in p.nodes for o in n.output] == [
        o for n in graph.node for o in n.output
    ]
    assert found[0].inputs == ("x0",)
    assert found[-1].outputs == ("x8",)
    for one, other in pairwise(found):
        assert set(other.inputs) <= {"x0", *(name for p in found for name in p.outputs)}
        if most > 8192:
            assert len(other.inputs) == 1
            assert other.inputs == one.outputs
    if most > 8192:
        assert len(found) == sizes


def built(ready: Path, out: Path, patch: Any, kind: str = "int8-rows") -> Mapping[str, float]:
    """A build that opens nothing of more than a byte as a whole; its differences."""
    patch.setattr(memory, "WHOLE_BYTES", 1)
    patch.setattr(memory, "PIECE_BYTES", LAYER)
    patch.setattr(onnxruntime, "open", None)
    patch.setattr(memory, "available_bytes", lambda: 1)
    made, _ = build(ready / "bundle", out, requantized(ready / "bundle", kind, gated=True), silent)
    return {**made.build.kernel_differences, **made.build.precision_losses}


def test_a_build_in_pieces_measures_the_same(
    ready: Path, in_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And needs no room for a whole component."""
    figures = manifest.read(in_int8).build
    found = built(ready, tmp_path / "engine", monkeypatch)
    for name, loss in figures.precision_losses.items():
        assert found[name] == pytest.approx(loss, rel=1e-2)


def test_what_does_not_fit_in_pieces_is_refused(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1)
    request = requantized(ready / "bundle", "int8-rows")
    with pytest.raises(OutOfMemory, match="building the largest component"):
        build(ready / "bundle", tmp_path / "engine", request, silent)
    monkeypatch.setattr(memory, "WHOLE_BYTES", 1)
    on_reference = requantized(ready / "bundle", "int8-rows", parse("reference"))
    with pytest.raises(OutOfMemory, match="building the largest component"):
        build(ready / "bundle", tmp_path / "engine", on_reference, silent)


def test_a_wrong_kernel_is_found_in_pieces(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pieces.cut

    def wrong(graph: onnx.GraphProto, most: int) -> list[pieces.Piece]:
        found = plain(graph, most)
        for node in (n for p in found for n in p.nodes if n.op_type == "GroupQueryAttention"):
            next(a for a in node.attribute if a.name == "scale").f *= 3
        return found

    monkeypatch.setattr(pieces, "cut", wrong)
    with pytest.raises(AccuracyError, match="lm differs from the reference"):
        built(ready, tmp_path / "engine", monkeypatch)
    assert not (tmp_path / "engine").exists()
