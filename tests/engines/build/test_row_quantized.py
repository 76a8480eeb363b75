"""build --precision int8-rows: products of 8-bit integers, a scale for each row of the input."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edgevlm.calibration import weight_only
from edgevlm.engines import manifest
from edgevlm.engines.backends import onnxruntime, sessions
from edgevlm.engines.build.build import build
from edgevlm.engines.lowering.graph import CONTRIB
from edgevlm.engines.lowering.lower import lower
from edgevlm.engines.lowering.signed import sign_weights
from edgevlm.engines.runtime import session
from edgevlm.engines.runtime.session import Session
from edgevlm.export import write
from edgevlm.toolkit import models, systems
from edgevlm.toolkit.bundle.goldens import reference, relative_rms
from edgevlm.toolkit.bundle.manifest import Bundle, Tensors
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.checkpoints.safetensors_io import row_blocks
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.target import parse, this_cpu
from edgevlm.toolkit.vlm.components import Component
from tests.conftest import HERE
from tests.engines.build.test_weight_only import QUESTION
from tests.pipeline import ask, engine_of, requantized, silent
from tests.sealing import edit_sealed
from tests.toolkit.models.test_architectures import component, feed, tensors

PLAN = weight_only.plan(weight_only.ROWS)
GOLDEN = HERE / "goldens/e2e_llava15"
EVERY = [(role, kind) for role in ("encoders", "mergers", "lms") for kind in models.kinds(role)]


def stored(part: Component, weights: Mapping[str, Array], folder: Path) -> Any:
    """The recorded component, its weights in a file beside it; the graph without its weights."""
    recorded = write.record(part, "fp32", PLAN)
    written = write._write_weights(folder / "w.safetensors", recorded, weights)
    model = recorded.model("w.safetensors", written)
    write.check_shapes(model)
    return model


def run(model: Any, folder: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    options = sessions.read_weights_from(sessions.session_options(1), folder)
    opened = sessions.open_session(model.SerializeToString(), options)
    known = {value.name for value in opened.get_inputs()}
    names = [output.name for output in opened.get_outputs()]
    found = opened.run(names, {k: v for k, v in inputs.items() if k in known})
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize(("role", "kind"), EVERY)
def test_the_reference_is_the_recorded_graph_kept_and_lowered(
    role: str, kind: str, tmp_path: Path
) -> None:
    """Values between two steps may be rounded to the other one: 1e-3 then, and 1e-6 otherwise."""
    part, inputs = component(role, kind), feed(component(role, kind))
    weights = tensors(part)
    model = stored(part, weights, tmp_path)
    assert {"RowQuantize", "RowQuantizedLinear"} <= {node.op_type for node in model.graph.node}
    file = Tensors(tmp_path / "w.safetensors")
    expected = part.forward(reference(part.name, file), Weights(file), inputs)
    exact = part.forward(NumpyOps(), Weights(weights), inputs)
    plain = [port.name for port in part.outputs if not port.updates]
    for graph in (model, lower(model, this_cpu())):
        found = run(graph, tmp_path, inputs)
        in_blocks = any(node.op_type == "MatMulNBits" for node in graph.graph.node)  # tied heads
        for name in plain:
            limit = 2e-2 if in_blocks else 1e-3
            assert relative_rms([(found[name], expected[name])]) < limit, name
            assert 1e-5 < relative_rms([(found[name], exact[name])]) < 0.2, name


def one_linear(inputs: int, outputs: int) -> tuple[Component, Mapping[str, Array]]:
    """A component of a single linear."""
    part = component("mergers", "mlp")
    generator = np.random.default_rng(3)
    weight = generator.standard_normal((inputs, outputs)).astype(np.float32)
    bias = generator.standard_normal(outputs).astype(np.float32)
    key = part.outputs[0].name

    def forward(op: Any, w: Weights[Any], given: Mapping[str, Any]) -> dict[str, Any]:
        return {key: op.linear(given[part.inputs[0].name], w / "only")}

    ports = (replace(part.inputs[0], shape=("tiles", "tokens", inputs)),)
    results = (replace(part.outputs[0], shape=("tiles", "tokens", outputs)),)
    weights = {"only.weight": weight, "only.bias": bias}
    shapes = {name: array.shape for name, array in weights.items()}
    return replace(part, forward=forward, shapes=shapes, inputs=ports, outputs=results), weights


def test_one_product_is_the_reference_and_a_row_is_its_own(tmp_path: Path) -> None:
    part, weights = one_linear(64, 24)
    generator = np.random.default_rng(5)
    x = generator.standard_normal((2, 6, 64)).astype(np.float32)
    x[1, 2] *= 1e4  # an outlier row
    x[0, 1, 7] = 50  # an outlier channel
    x[0, 4] = 0
    port = part.inputs[0].name
    model, exact = stored(part, weights, tmp_path), x @ weights["only.weight"]
    file = Tensors(tmp_path / "w.safetensors")
    (expected,) = part.forward(reference("m", file), Weights(file), {port: x}).values()
    for graph in (model, lower(model, this_cpu())):
        (found,) = run(graph, tmp_path, {port: x}).values()
        np.testing.assert_allclose(
            found, expected, atol=1e-5 * np.abs(expected[0]).max(), rtol=1e-5
        )
        for i, j in np.ndindex(2, 6):
            (alone,) = run(graph, tmp_path, {port: x[i : i + 1, j : j + 1]}).values()
            np.testing.assert_array_equal(alone[0, 0], found[i, j])
            size = max(float(np.abs(exact[i, j]).max()), 1e-6)
            assert np.abs(found[i, j] - weights["only.bias"] - exact[i, j]).max() < 0.05 * size


def test_an_input_without_rows_gives_none(tmp_path: Path) -> None:
    """As the last layer has it while a piece of a prompt is read that scores no position."""
    part, weights = one_linear(32, 8)
    model = stored(part, weights, tmp_path)
    x = np.zeros((1, 0, 32), np.float32)
    for graph in (model, lower(model, this_cpu())):
        (found,) = run(graph, tmp_path, {part.inputs[0].name: x}).values()
        assert found.shape == (1, 0, 8)


def test_a_prompt_of_several_chunks_is_read(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle, tmp_path / "e", requantized(bundle, weight_only.ROWS), silent)
    whole = Session.open(tmp_path / "e").answer(QUESTION).token_ids
    monkeypatch.setattr(session, "PREFILL_CHUNK", 7)
    assert Session.open(tmp_path / "e").answer(QUESTION).token_ids == whole


def test_what_reads_one_input_shares_its_codes() -> None:
    graph = write.record(component("lms", "llama"), "fp32", PLAN).ops.nodes
    by_name = {node.name: node for node in graph}
    codes = {n: by_name[f"lm/layers.0/attention/{n}"].input[0] for n in "qkv"}
    assert len(set(codes.values())) == 1
    kinds = [node.op_type for node in graph]
    assert kinds.count("RowQuantize") < 0.7 * kinds.count("RowQuantizedLinear")


def test_signed_weights_can_be_made_unsigned_elsewhere() -> None:
    """ONNX Runtime does so without VNNI, and refuses tensors that two nodes read."""
    nodes, weights = list[onnx.NodeProto](), list[onnx.TensorProto]()
    for name, weight in (("a", "one"), ("b", "two"), ("c", "both"), ("d", "both")):
        inputs = ["x", weight, "step", "steps", "middle", "middle"]
        nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [name], domain=CONTRIB))
    for name in ("one", "two", "both"):
        external = onnx.TensorProto(name=name, data_type=onnx.TensorProto.UINT8)
        external.data_location = onnx.TensorProto.EXTERNAL
        weights.append(external)
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], weights))
    assert sign_weights(model) == {"one", "two"}
    assert [node.input[5] for node in model.graph.node] == ["", "", "middle", "middle"]
    kinds = [onnx.TensorProto.INT8] * 2 + [onnx.TensorProto.UINT8]
    assert [t.data_type for t in model.graph.initializer] == kinds


def test_signed_weights_give_the_same_product(tmp_path: Path) -> None:
    """Where U8 by S8 is exact, the engine's weights are signed: code - 128 each."""
    part, weights = one_linear(32, 8)
    x = np.random.default_rng(1).standard_normal((1, 3, 32)).astype(np.float32)
    plain = lower(stored(part, weights, tmp_path), this_cpu())
    (expected,) = run(plain, tmp_path, {part.inputs[0].name: x}).values()
    model = lower(stored(part, weights, tmp_path), this_cpu())
    assert sign_weights(model) == {"only.weight.int8_channels"}
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert kinds["only.weight.int8_channels"] == onnx.TensorProto.INT8
    file = (tmp_path / "w.safetensors").read_bytes()
    codes = Tensors(tmp_path / "w.safetensors")._file.read("only.weight.int8_channels")
    flipped = b"".join((b ^ np.uint8(128)).tobytes() for b in row_blocks(codes))
    (tmp_path / "w.safetensors").write_bytes(file.replace(codes.tobytes(), flipped))
    (found,) = run(model, tmp_path, {part.inputs[0].name: x}).values()
    np.testing.assert_array_equal(found, expected)


# -- engines -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("float")
    engine_of(GOLDEN / "llava-v1.5-tiny", work)
    return work / "bundle"


@pytest.mark.parametrize("unsigned", [True, False])
def test_the_engine_gives_the_tokens_of_the_reference(
    unsigned: bool, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "_unsigned_is_best", lambda: unsigned)
    answers = []
    for name, target in (("r", parse("reference")), ("c", this_cpu())):
        request = requantized(bundle, weight_only.ROWS, target, gated=True)
        made, _ = build(bundle, tmp_path / name, request, silent)
        assert max(made.build.kernel_differences.values()) < 1e-2
        assert all(1e-3 < loss < 0.1 for loss in made.build.precision_losses.values())
        answers.append(Session.open(tmp_path / name).answer(QUESTION).token_ids)
    assert len(answers[0]) == 24
    assert answers[0] == answers[1]
    products = {d.op for d in made.lowering}
    assert "edgevlm.RowQuantizedLinear" in products
    assert "--precision int8-rows" in made.rebuild_command(tmp_path / "c")


def test_a_bundle_in_half_precision_takes_it_too(bundle: Path, tmp_path: Path) -> None:
    source = replace(systems.load(bundle, Options()), plan=PLAN)
    write.write_bundle(source, tmp_path / "h", dtype="fp16", made_by="tests", progress=silent)
    request = replace(requantized(bundle, weight_only.ROWS), requantization=None)
    made, _ = build(tmp_path / "h", tmp_path / "e", request, silent)
    assert made.plan == PLAN
    assert ask(tmp_path / "e", "<image>\nHello", [GOLDEN / "image.png"]).token_ids


def test_a_bundle_keeps_its_values_when_it_is_read_again(bundle: Path, tmp_path: Path) -> None:
    source = replace(systems.load(bundle, Options()), plan=PLAN)
    write.write_bundle(source, tmp_path / "a", made_by="tests", progress=silent)
    again = systems.load(tmp_path / "a", Options())
    assert again.plan == PLAN
    write.write_bundle(again, tmp_path / "b", made_by="tests", progress=silent)
    first, second = (Bundle.open(tmp_path / n).tensors("lm") for n in "ab")
    assert "layers.0.mlp.up.weight" in first.by_channel
    assert sorted(first) == sorted(Bundle.open(bundle).tensors("lm"))
    for key in first:
        assert first[key].shape == first.shape(key)
        np.testing.assert_allclose(first[key], second[key], rtol=1e-5, atol=1e-7)


def test_engines_of_before_are_read(bundle: Path, tmp_path: Path) -> None:
    """What engine.json has gained since has a default."""
    shutil.copytree(bundle.parent / "engine-cpu", tmp_path / "e")
    edit_sealed(tmp_path / "e/engine.json", lambda data: data.pop("tuning_options"))
    assert manifest.read(tmp_path / "e").precision is None


def test_merging_levels_multiplies_in_8_bits(tmp_path: Path) -> None:
    """COMM's matrix over all levels of an encoder is the largest of its merger."""
    part = component("mergers", "comm")
    model = stored(part, tensors(part), tmp_path)
    merged = [name for name in part.shapes if name.endswith(".linear.weight")]
    kept = {tensor.name for tensor in model.graph.initializer}
    assert "LayerMerge" not in {node.op_type for node in model.graph.node}
    assert merged and all(name + ".int8_channels" in kept for name in merged)


def test_downsampling_of_a_convnext_multiplies_in_8_bits(tmp_path: Path) -> None:
    part = component("encoders", "convnext")
    model = stored(part, tensors(part), tmp_path)
    products = [node for node in model.graph.node if node.op_type == "RowQuantizedLinear"]
    assert sum("/down/linear" in node.name for node in products) == 2
