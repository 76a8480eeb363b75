"""calibrate --to fp8: graph, reference, ONNX's own evaluator and engines on the processor agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from edgevlm import api, cli
from edgevlm.calibration.histogram import METHODS
from edgevlm.calibration.static import StaticCalibration
from edgevlm.engines.backends import onnx_files, onnxruntime
from edgevlm.engines.build import build as builder
from edgevlm.engines.build.check import TOLERANCE
from edgevlm.engines.lowering.lower import lower
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.export import write
from edgevlm.toolkit.bundle.goldens import reference, relative_difference, relative_rms
from edgevlm.toolkit.bundle.manifest import Bundle, Tensors
from edgevlm.toolkit.errors import BundleError, ConfigError
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Weights
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule
from edgevlm.toolkit.quantization.static import FP8, INT8
from edgevlm.toolkit.target import this_cpu
from edgevlm.toolkit.vlm.cost import stored_bytes
from tests.calibration.test_histogram import histogram, normal
from tests.calibration.test_static import EVERY, draw, share_as_onnx_has_it, stored
from tests.conftest import HERE
from tests.engines.build.test_row_quantized import run
from tests.pipeline import engine_of
from tests.sealing import reseal
from tests.systems.test_same_answer import replayed
from tests.toolkit.models.test_architectures import component, feed, tensors
from tests.toolkit.ops.test_wrappers import largest


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn") / "images", 9)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("llava")
    engine_of(HERE / "goldens/e2e_llava15/llava-v1.5-tiny", work)
    return work / "bundle"


@pytest.fixture(scope="module")
def in_fp8(bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp8") / "q"
    api.calibrate(bundle, out, images=images, to="fp8")
    return out


@pytest.mark.parametrize(("role", "kind"), EVERY)
def test_the_reference_is_the_recorded_graph_kept_and_lowered(
    role: str, kind: str, tmp_path: Path
) -> None:
    part, inputs = component(role, kind), feed(component(role, kind))
    weights = tensors(part)
    merged = Rule("*/linear", "float") if kind == "comm" else Rule("lm/head", "float")
    plan = PrecisionPlan("fp8", (merged,), largest(part, weights, inputs))
    model = stored(part, weights, plan, tmp_path)
    file = Tensors(tmp_path / "w.safetensors")
    assert set(file) >= set(part.shapes)
    assert all(file.shape(key) == shape == file[key].shape for key, shape in part.shapes.items())
    expected = part.forward(reference(part.name, file), Weights(file), inputs)
    exact = part.forward(NumpyOps(), Weights(weights), inputs)
    record, lowered = write.describe(part, "g.onnx", "w.safetensors"), tmp_path / "lowered"
    lowered.mkdir()
    graph = lower(onnx.ModelProto.FromString(model.SerializeToString()), this_cpu())
    names = frozenset(name for name, entry in file._file.entries.items() if entry.dtype == "fp8")
    changes = onnxruntime._changes(file._file, frozenset(), names)
    onnx_files.write(tmp_path, lowered, record, graph, changes)
    for found in (run(model, tmp_path, inputs), run(graph, lowered, inputs)):
        for port in part.outputs:
            if port.updates:
                continue
            # Near a tie a value may be rounded to the other one, a sixteenth away, and what follows
            # mixes it into others: few values of a tiny model are spared.
            apart = relative_rms([(found[port.name], expected[port.name])])
            loss = relative_rms([(found[port.name], exact[port.name])])
            assert apart < 0.3 * loss or not file.input_steps, port.name
            assert loss < 0.3, port.name


def test_the_graph_means_the_same_to_onnx_itself(tmp_path: Path) -> None:
    part = component("mergers", "mlp")
    weights, inputs = tensors(part), feed(component("mergers", "mlp"))
    plan = PrecisionPlan("fp8", (), largest(part, weights, inputs))
    model = stored(part, weights, plan, tmp_path)
    kinds = {t.name: t for t in model.graph.initializer}
    rounding = [n for n in model.graph.node if n.op_type.endswith("quantizeLinear")]
    rounding += [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    for node in rounding:
        assert kinds[node.input[2]].data_type == onnx.TensorProto.FLOAT8E4M3FN
        assert kinds[node.input[1]].dims == kinds[node.input[2]].dims == []
    assert share_as_onnx_has_it(part, model, inputs, tmp_path) > 0.9


def test_bundle_reference_and_engine_agree(in_fp8: Path, images: Path, tmp_path: Path) -> None:
    written = Bundle.open(in_fp8)
    assert written.manifest.plan.precisions == {"fp8"}
    assert written.manifest.plan.at("lm/head") == "float"
    for actual, expected in replayed(written):
        assert relative_difference(actual, expected) < 1e-5
    said: list[str] = []
    made = api.build_engine(in_fp8, tmp_path / "e", progress=said.append)
    assert any("FP8 is multiplied as float32: neither smaller nor faster" in x for x in said)
    told = {d.why for d in made.lowering if d.op == "DequantizeLinear"}
    assert len(told) == 2
    assert any("written as the floats" in why for why in told)
    assert max(made.build.kernel_differences.values()) < 1e-3 < TOLERANCE["fp8"]
    assert all(1e-3 < loss < 0.2 for loss in made.build.precision_losses.values())
    with Session.open(tmp_path / "e") as session:
        question = Question("What is in the image?", [images / "00.png"], 6)
        assert len(session.answer(question).token_ids) == 6
    sizes = stored_bytes(written.model, written.manifest.plan, 4)
    for part in written.manifest.components:
        entries = written.tensors(part.name)._file.entries
        assert sizes[part.name] == sum(entry.nbytes for entry in entries.values())
        assert "fp8" in {entry.dtype for entry in entries.values()}


def test_the_engine_of_the_reference_answers_as_onnx_runtime_does(
    in_fp8: Path, images: Path, tmp_path: Path
) -> None:
    question = Question("What is in the image?", [images / "00.png"], 6)
    said = []
    for target in ("cpu", "reference"):
        api.build_engine(in_fp8, tmp_path / target, target=target)
        with Session.open(tmp_path / target) as session:
            said.append(session.answer(question).token_ids)
    assert said[0] == said[1]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_codes_survive_writing_again(
    dtype: str, bundle: Path, images: Path, tmp_path: Path
) -> None:
    api.export_bundle(bundle, tmp_path / "half", dtype=dtype)
    keep = ("lm/*",)
    api.calibrate(tmp_path / "half", tmp_path / "q", images=images, to="fp8", keep_float=keep)
    opened = Bundle.open(tmp_path / "q")
    assert opened.manifest.dtype == dtype
    made = api.build_engine(tmp_path / "q", tmp_path / "e")
    assert max(made.build.kernel_differences.values()) < 1e-3
    api.export_bundle(tmp_path / "q", tmp_path / "again", dtype=dtype)
    again = Bundle.open(tmp_path / "again")
    for name in ("encoder.clip", "merger"):
        one, two = opened.tensors(name), again.tensors(name)
        assert one.input_steps
        for key in one.input_steps:
            first, second = (t._file.read(f"{key}.fp8_static") for t in (one, two))
            np.testing.assert_array_equal(first, second)
            assert one.input_steps[key] == two.input_steps[key]


def test_codes_that_are_no_numbers_are_refused(in_fp8: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(in_fp8, bad)
    file = Bundle.open(bad).tensors("merger")._file
    name = next(n for n, entry in file.entries.items() if entry.dtype == "fp8")
    data = bytearray(file.path.read_bytes())
    data[file.entries[name].offset + 5] = 0x7F
    file.path.write_bytes(data)
    reseal(bad / "manifest.json")
    refusal = f"{name}: 1 of .* FP8 codes are NaN"
    with pytest.raises(BundleError, match=refusal):
        api.build_engine(bad, tmp_path / "e")
    assert not (tmp_path / "e").exists()
    request = api.build_request(bad, target="tensorrt-rtx@1.7/sm_89")
    with pytest.raises(BundleError, match=refusal):  # such an engine is not compared here
        builder.lowering(Bundle.open(bad), request)


def test_the_report_names_the_format(bundle: Path, images: Path, tmp_path: Path) -> None:
    report, out = tmp_path / "r.json", tmp_path / "q"
    arguments = ["calibrate", bundle, out, "--images", images, "--to", "fp8"]
    arguments += ["--keep-float", "lm/layers.1/*", "--report", report]
    found = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert found.exit_code == 0, found.output
    assert "in fp8" in found.output
    data = json.loads(report.read_text())
    shares = {c["name"]: c["share_fp8"] for c in data["components"]}
    assert shares["encoder.clip"] > 0.8
    assert 0 < shares["lm"] < 0.8
    assert all(c["cosine"] > 0.97 for c in data["components"])
    assert 0 < data["kl"] < 0.1


def test_ranges_by_fp8s_own_grid() -> None:
    """E4M3 is as exact for small values as for large ones, so that clipping gains nothing."""
    x = normal(100_000)
    x[77] = 120.0
    found = histogram(x)
    largest = METHODS["mse"](found, FP8)

    def error(limit: float) -> float:
        step = FP8.steps(np.asarray(limit))
        return float(np.square(FP8.values(FP8.codes(x / step)) * step - x).mean())

    assert error(largest) <= 1.01 * min(error(limit) for limit in np.linspace(1, 120, 200))
    assert METHODS["minmax"](found, FP8) == METHODS["minmax"](found, INT8) == 120.0
    assert 0 < METHODS["entropy"](found, FP8) <= 120.0


def test_options_of_other_kinds_are_refused(bundle: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--block has no meaning for --to fp8"):
        api.calibrate(bundle, tmp_path / "q", images=images, to="fp8", block=64)
    found = api.calibrate(
        bundle,
        tmp_path / "q",
        images=images,
        to="fp8",
        keep_float=("lm/*", "encoder.*"),
        bias_correction=True,
        smooth=0.5,
    )
    assert isinstance(found, StaticCalibration)
    assert found.corrected > 0
    with pytest.raises(ConfigError, match="is quantized already"):
        api.calibrate(tmp_path / "q", tmp_path / "r", images=images, to="fp8")
