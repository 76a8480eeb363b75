"""build --precision: weights in 8 or 4 bits, recorded again, and what is left of the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgevlm.calibration import weight_only
from edgevlm.engines import manifest
from edgevlm.engines.backends import sessions
from edgevlm.engines.build.build import Request, build
from edgevlm.engines.build.check import TOLERANCE
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.export import write
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.goldens import relative_difference
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.images import decode
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.target import parse, this_cpu
from edgevlm.toolkit.text import prompts
from tests.conftest import HERE
from tests.pipeline import LOSS_IN_4_BITS, engine_of, requantized, silent
from tests.systems.test_same_answer import replayed

GOLDEN = HERE / "goldens/e2e_llava15"
QUESTION = Question("What is in the image?", [GOLDEN / "image.png"], 24)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float bundle, its engine beside it."""
    work = tmp_path_factory.mktemp("float")
    engine_of(GOLDEN / "llava-v1.5-tiny", work)
    return work / "bundle"


def source_of(bundle: Path, plan: PrecisionPlan) -> Source:
    return replace(systems.load(bundle, Options()), plan=plan)


def weights_of(engine: Path) -> Mapping[str, int]:
    made = manifest.read(engine)
    return {c.name: made.files[c.weights].nbytes for c in made.components}


@pytest.mark.parametrize("kind", weight_only.KINDS)
def test_the_portable_graph_is_the_reference(kind: str, bundle: Path, tmp_path: Path) -> None:
    """Only the weights are rounded: in plain ONNX Runtime the answer is the reference's to 1e-4."""
    plan = weight_only.plan(kind)
    write.write_bundle(source_of(bundle, plan), tmp_path / "b", made_by="tests", progress=silent)
    for found, expected in replayed(Bundle.open(tmp_path / "b")):
        assert relative_difference(found, expected) < TOLERANCE["fp32"]
    graph = onnx.load(str(tmp_path / "b/lm.onnx"), load_external_data=False).graph
    kinds = {t.data_type for t in graph.initializer}
    assert (onnx.TensorProto.UINT4 in kinds) == (kind == "int4")
    assert onnx.TensorProto.UINT8 in kinds


@pytest.mark.parametrize("kind", weight_only.KINDS)
def test_the_engine_multiplies_by_the_stored_bytes(kind: str, bundle: Path, tmp_path: Path) -> None:
    made, _ = build(bundle, tmp_path / "e", requantized(bundle, kind), silent)
    assert {d.into for d in made.lowering if d.op == "edgevlm.BlockedLinear"} == {
        "com.microsoft.MatMulNBits"
    }
    assert max(made.build.kernel_differences.values()) < TOLERANCE["int8"]
    small, full = weights_of(tmp_path / "e"), weights_of(bundle.parent / "engine-cpu")
    assert small["lm"] < (0.42 if kind == "int4" else 0.5) * full["lm"]
    assert not (tmp_path / "e" / "bundle").exists()
    assert len(Session.open(tmp_path / "e").answer(QUESTION).token_ids) == 24
    drift = relative_difference(logits(tmp_path / "e"), logits(bundle.parent / "engine-cpu"))
    assert drift < (0.1 if kind == "int8" else 0.5)  # random weights: nothing is robust in them


def logits(engine: Path) -> Array:
    """After the golden's whole prompt."""
    with Session.open(engine) as session:
        features = session.encode([decode.load(GOLDEN / "image.png")], Clock())
        text = json.loads((GOLDEN / "case.json").read_text())["prompt"]
        prompt = prompts.tokenize(session.model.prompts, session.tokenizer, text)
        sequence = prompts.assemble(prompt, features.indices)
        return np.array(session.prefill(sequence, features.rows, session.new_state()))


def test_the_reference_engine_takes_it_too(bundle: Path, tmp_path: Path) -> None:
    found = []
    for name, target in (("r", parse("reference")), ("c", this_cpu())):
        build(bundle, tmp_path / name, requantized(bundle, "int4", target), silent)
        found.append(logits(tmp_path / name))
    assert relative_difference(found[1], found[0]) < TOLERANCE["int8"]


def test_half_precision_bundles_are_quantized_too(bundle: Path, tmp_path: Path) -> None:
    source = systems.load(bundle, Options())
    write.write_bundle(source, tmp_path / "h", dtype="fp16", made_by="tests", progress=silent)
    build(tmp_path / "h", tmp_path / "e", requantized(tmp_path / "h", "int4"), silent)
    build(bundle, tmp_path / "f", requantized(bundle, "int4"), silent)
    half, full = (Session.open(tmp_path / n).answer(QUESTION).token_ids for n in "ef")
    assert half == full  # the golden weights are exact in fp16


def test_a_quantized_bundle_in_half_precision_runs(bundle: Path, tmp_path: Path) -> None:
    source = source_of(bundle, weight_only.plan("int4"))
    write.write_bundle(source, tmp_path / "b", dtype="fp16", made_by="tests", progress=silent)
    request = Request(this_cpu(), None, False, "t", accept_loss=LOSS_IN_4_BITS)
    made, _ = build(tmp_path / "b", tmp_path / "e", request, silent)
    assert made.plan == source.plan
    assert made.precision is None
    assert len(Session.open(tmp_path / "e").answer(QUESTION).token_ids) == 24


def test_a_quantized_bundle_keeps_its_plan_and_its_values(bundle: Path, tmp_path: Path) -> None:
    source = source_of(bundle, weight_only.plan("int4"))
    write.write_bundle(source, tmp_path / "a", made_by="tests", progress=silent)
    again = systems.load(tmp_path / "a", Options())
    assert again.plan == source.plan
    write.write_bundle(again, tmp_path / "b", made_by="tests", progress=silent)
    first, second = (Bundle.open(tmp_path / n).tensors("lm") for n in "ab")
    assert list(first) == list(second)
    assert "layers.0.mlp.up.weight" in first
    for key in first:
        assert first[key].shape == first.shape(key)
        np.testing.assert_allclose(first[key], second[key], rtol=1e-5, atol=1e-7)


def test_the_same_precision_is_built_once(bundle: Path, tmp_path: Path) -> None:
    engine = tmp_path / "e"
    assert build(bundle, engine, requantized(bundle, "int8"), silent)[1] is True
    made, worked = build(bundle, engine, requantized(bundle, "int8"), silent)
    assert not worked
    assert "--precision int8" in made.rebuild_command(engine)
    forced = replace(requantized(bundle, "int4"), force=True)
    assert build(bundle, engine, forced, silent)[1] is True
    assert manifest.read(engine).precision == "int4"


def test_weights_that_no_block_divides_stay_as_they_are(bundle: Path) -> None:
    source = source_of(bundle, weight_only.plan("int8"))
    lm = source.model.lm
    odd = replace(source.model, lm=replace(lm, config=replace(lm.config, intermediate_size=72)))
    model = write.graphs(replace(source, model=odd))["lm"]
    downs = [n for n in model.graph.node if n.name.endswith("mlp/down")]
    ups = [n for n in model.graph.node if n.name.endswith("mlp/up")]
    assert {n.op_type for n in downs} == {"MatMul"}
    assert {n.op_type for n in ups} == {"BlockedLinear"}


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="'int3' is unknown") as caught:
        weight_only.plan("int3")
    assert "int8, int4" in caught.value.hint


def test_without_its_kernel_it_still_runs(bundle: Path, tmp_path: Path) -> None:
    """Any ONNX Runtime reads the bundle's graph: no op of ours or of a vendor is needed."""
    source = source_of(bundle, weight_only.plan("int8"))
    write.write_bundle(source, tmp_path / "b", made_by="tests", progress=silent)
    model: Any = onnx.load(str(tmp_path / "b/merger.onnx"), load_external_data=False)
    assert {o.domain for o in model.opset_import} == {"", "edgevlm"}
    sessions.open_session(tmp_path / "b/merger.onnx")
