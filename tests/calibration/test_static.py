"""calibrate --to int8-static: ranges from images and prompts; graph, reference, engine agree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator
from PIL import Image
from typer.testing import CliRunner

from edgevlm import api, cli
from edgevlm.calibration import greedy, smooth
from edgevlm.calibration.appraise import Whole
from edgevlm.calibration.calibrator import Calibrator
from edgevlm.calibration.chain import Arithmetic, Chain, Passage, in_numpy
from edgevlm.calibration.pictures import QUESTION, Given, Sample, gather
from edgevlm.calibration.samples import Settings
from edgevlm.calibration.static import StaticCalibration
from edgevlm.calibration.static_plan import layers_of, plan_of
from edgevlm.engines.backends import sessions
from edgevlm.engines.build import check
from edgevlm.engines.build.check import TOLERANCE
from edgevlm.engines.lowering.lower import lower
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.export import write
from edgevlm.toolkit import models, systems
from edgevlm.toolkit.bundle.goldens import reference, relative_difference, relative_rms
from edgevlm.toolkit.bundle.manifest import Bundle, Tensors
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import AccuracyError, CalibrationError, ConfigError
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.ops.wrappers import Observe
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule
from edgevlm.toolkit.target import this_cpu
from edgevlm.toolkit.vlm.components import Component
from edgevlm.toolkit.vlm.cost import stored_bytes
from edgevlm.training import forward
from tests.calibration.peaks import peak
from tests.conftest import HERE
from tests.engines.build.test_row_quantized import run
from tests.pipeline import engine_of, silent
from tests.systems.test_same_answer import replayed
from tests.toolkit.models.test_architectures import AXES, component, feed, tensors
from tests.toolkit.ops.test_wrappers import largest

EVERY = [(role, kind) for role in ("encoders", "mergers", "lms") for kind in models.kinds(role)]
CASES = {"e2e_llava15": "llava-v1.5-tiny", "e2e_convllava": "convllava-tiny"}
TEXT = Path(__file__)


def draw(folder: Path, count: int) -> Path:
    """Soft blobs of colour in several sizes."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        rough = generator.integers(0, 256, (6, 6, 3)).astype(np.uint8)
        size = (80 + 15 * number, 100)
        Image.fromarray(rough).resize(size).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn") / "images", 9)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, checkpoint in CASES.items():
        work = tmp_path_factory.mktemp(name)
        engine_of(HERE / "goldens" / name / checkpoint, work)
        found[name] = work / "bundle"
    return found


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path]) -> Path:
    return bundles["e2e_llava15"]


def calibrated(bundle: Path, out: Path, **given: Any) -> StaticCalibration:
    found = api.calibrate(bundle, out, to="int8-static", **given)
    assert isinstance(found, StaticCalibration)
    return found


def calibrator(bundle: Path, arithmetic: Arithmetic | None = None, **settings: Any) -> Calibrator:
    opened = Bundle.open(bundle)
    chain = Chain(opened.vlm, opened.tokenizer())
    asked = Settings("int8-static", **settings)
    return Calibrator(chain, arithmetic or in_numpy(), asked, silent)


def chosen(bundle: Path, images: Path, *more: Any) -> tuple[Sample, ...]:
    return gather(Bundle.open(bundle), Given(images, *more), Settings(), silent).calibrating


# -- what is recorded and stored ---------------------------------------------------------------


def stored(part: Component, weights: Mapping[str, Array], plan: PrecisionPlan, folder: Path) -> Any:
    """The recorded component with its weights beside it; the graph."""
    recorded = write.record(part, "fp32", plan)
    written = write._write_weights(folder / "w.safetensors", recorded, weights)
    model = recorded.model("w.safetensors", written)
    write.check_shapes(model)
    return model


@pytest.mark.parametrize(("role", "kind"), EVERY)
def test_the_reference_is_the_recorded_graph_kept_and_lowered(
    role: str, kind: str, tmp_path: Path
) -> None:
    part, inputs = component(role, kind), feed(component(role, kind))
    weights = tensors(part)
    merged = Rule("*/linear", "float") if kind == "comm" else Rule("lm/head", "float")
    plan = PrecisionPlan("int8", (merged,), largest(part, weights, inputs))
    model = stored(part, weights, plan, tmp_path)
    file = Tensors(tmp_path / "w.safetensors")
    assert set(file) >= set(part.shapes)
    assert all(file.shape(key) == shape == file[key].shape for key, shape in part.shapes.items())
    expected = part.forward(reference(part.name, file), Weights(file), inputs)
    exact = part.forward(NumpyOps(), Weights(weights), inputs)
    for graph in (model, lower(model, this_cpu())):
        found = run(graph, tmp_path, inputs)
        for port in part.outputs:
            if port.updates:
                continue
            apart = np.abs(found[port.name] - expected[port.name])
            scale = np.abs(expected[port.name]).max()
            rows = apart.reshape(-1, apart.shape[-1]).max(-1)
            # Near a tie a value may be rounded to the other step, in a row or two.
            assert (rows < 1e-5 * scale).mean() > 0.9, port.name
            assert apart.max() < 0.02 * scale, port.name
            loss = relative_rms([(found[port.name], exact[port.name])])
            assert loss < 0.2, port.name
            assert loss > 1e-4 or not file.input_steps, port.name


def test_zero_points_are_zero_and_codes_signed(tmp_path: Path) -> None:
    """What TensorRT asks for; q, k and v have Q/DQ of their own around one input."""
    for role, kind in (("encoders", "convnext"), ("lms", "llama")):
        part = component(role, kind)
        weights, inputs = tensors(part), feed(component(role, kind))
        plan = PrecisionPlan("int8", (), largest(part, weights, inputs))
        graph = stored(part, weights, plan, tmp_path).graph
        stores = {t.name: t for t in graph.initializer}
        kinds = [node.op_type for node in graph.node]
        layers = kinds.count("MatMul") + kinds.count("Conv")
        quantize = [node for node in graph.node if node.op_type == "QuantizeLinear"]
        dequantize = [node for node in graph.node if node.op_type == "DequantizeLinear"]
        assert len(dequantize) == 2 * layers
        for node in (*quantize, *dequantize):
            zeros = onnx.numpy_helper.to_array(stores[node.input[2]])
            assert zeros.dtype == np.int8
            assert not zeros.any()
        for node in dequantize[1:]:
            if node.input[0] in stores:
                codes = stores[node.input[0]]
                axis = next(a.i for a in node.attribute if a.name == "axis")
                assert codes.data_type == onnx.TensorProto.INT8
                assert axis == (1 if len(codes.dims) == 2 else 0)
        if kind == "llama":
            by_name = {node.name: node for node in graph.node}
            read = [by_name[f"lm/layers.0/attention/{n}"].input[0] for n in "qkv"]
            assert len({by_name[name].input[0] for name in read}) == 3
        assert len(quantize) == layers
        assert {name for node in graph.node for name in node.input} >= set(stores)


def test_a_layer_without_a_range_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"no range for the input of merger/linears\.0"):
        write.record(component("mergers", "mlp"), "fp32", PrecisionPlan("int8"))


def test_the_graph_means_the_same_to_onnx_itself(tmp_path: Path) -> None:
    """Its reference evaluator, which knows nothing of ONNX Runtime's rewriting."""
    part = component("mergers", "mlp")
    weights, inputs = tensors(part), feed(component("mergers", "mlp"))
    plan = PrecisionPlan("int8", (), largest(part, weights, inputs))
    model = stored(part, weights, plan, tmp_path)
    assert share_as_onnx_has_it(part, model, inputs, tmp_path) > 0.9


def share_as_onnx_has_it(part: Any, model: Any, inputs: Mapping[str, Array], folder: Path) -> float:
    """The share of rows of a merger's features that our reference and ONNX's give alike."""
    file = Tensors(folder / "w.safetensors")
    expected = part.forward(reference(part.name, file), Weights(file), inputs)["features"]
    load_external_data_for_model(model, str(folder))
    (found,) = ReferenceEvaluator(model).run(None, dict(inputs))
    rows = np.abs(found - expected).max(-1)
    return float((rows < 1e-5 * np.abs(expected).max()).mean())


def test_products_are_of_integers_where_several_read_one_input(tmp_path: Path) -> None:
    """ONNX Runtime would merge the Q/DQ of q, k and v, and then multiply floats."""
    part = component("lms", "llama")
    weights, inputs = tensors(part), feed(component("lms", "llama"))
    plan = PrecisionPlan("int8", (), largest(part, weights, inputs))
    model = lower(stored(part, weights, plan, tmp_path), this_cpu())
    options = sessions.read_weights_from(sessions.session_options(1), tmp_path)
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    sessions.open_session(model.SerializeToString(), options)
    nodes = onnx.load(str(tmp_path / "run.onnx"), load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("MatMul") == kinds.count("DequantizeLinear") == 0
    assert kinds.count("MatMulIntegerToFloat") == len(plan.ranges)


# -- the whole way -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_bundle_reference_and_engine_agree(
    name: str, bundles: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    found = calibrated(bundles[name], tmp_path / "q", images=images)
    written = Bundle.open(tmp_path / "q")
    assert written.manifest.plan == found.plan
    assert (found.plan.samples, found.held_out) == (7, 2)
    for actual, expected in replayed(written):
        assert relative_difference(actual, expected) < 1e-5
    made = api.build_engine(tmp_path / "q", tmp_path / "e")
    assert max(made.build.kernel_differences.values()) < 1e-3 < TOLERANCE["int8_rows"]
    assert set(made.build.precision_losses) == {c.name for c in found.components}
    assert min(made.build.precision_losses.values()) > 1e-3
    with Session.open(tmp_path / "e") as session:
        question = Question("What is in the image?", [images / "00.png"], 6)
        assert len(session.answer(question).token_ids) == 6
    sizes = stored_bytes(written.model, found.plan, 4)
    for part in written.manifest.components:
        entries = written.tensors(part.name)._file.entries
        assert sizes[part.name] == sum(entry.nbytes for entry in entries.values())
    for cost in found.components:
        assert cost.cosine > 0.99
        assert cost.share > (0.5 if cost.name == "lm" else 0.8)
    assert [c.error for c in found.layers] == sorted((c.error for c in found.layers), reverse=True)
    assert {c.path for c in found.layers} == set(found.plan.ranges)
    assert found.same_top_1 > 0.8


def test_ranges_are_those_of_a_brute_force_run(bundle: Path, images: Path) -> None:
    """minmax is exact, with NumPy and with torch; every layer has a range."""
    samples = chosen(bundle, images)
    weights = systems.load(bundle, Options()).weights
    every: dict[str, float] = {}

    def see(path: str, x: Array) -> None:
        every[path] = max(every.get(path, 0.0), float(np.abs(x).max()))

    by = Passage(weights, in_numpy(), lambda ops, part: Observe(ops, part.name, see))
    made = calibrator(bundle, range="minmax")
    for sample in samples:
        made._chain.run_all([sample], by)
    del every["lm/head"]
    plan = plan_of(made._chain.model, Settings("int8-static"))
    assert made.ranges(weights, plan, samples) == every
    interpreter = forward.interpreter()
    assert interpreter is not None
    torched = calibrator(bundle, Arithmetic(*interpreter), range="minmax")
    found = torched.ranges(weights, plan, samples)
    assert found == pytest.approx(every, rel=1e-4)


def test_memory_does_not_grow_with_samples(bundle: Path, images: Path) -> None:
    one = chosen(bundle, images)[:1]
    made, weights = calibrator(bundle), systems.load(bundle, Options()).weights
    plan = plan_of(made._chain.model, Settings("int8-static"))

    def taken(count: int) -> int:
        return peak(lambda: made.ranges(weights, plan, one * count))

    taken(1)
    assert taken(12) < 1.1 * taken(4)  # four go together


def test_half_precision_stays_and_codes_survive_writing_again(
    bundle: Path, images: Path, tmp_path: Path
) -> None:
    api.export_bundle(bundle, tmp_path / "half", dtype="fp16")
    calibrated(tmp_path / "half", tmp_path / "q", images=images)
    opened = Bundle.open(tmp_path / "q")
    assert opened.manifest.dtype == "fp16"
    made = api.build_engine(tmp_path / "q", tmp_path / "e")
    assert max(made.build.kernel_differences.values()) < 1e-3
    api.export_bundle(tmp_path / "q", tmp_path / "again", dtype="fp16")
    again = Bundle.open(tmp_path / "again")
    for name in ("encoder.clip", "merger", "lm"):
        one, two = opened.tensors(name), again.tensors(name)
        for key in one.input_steps:
            first, second = (t._file.read(f"{key}.int8_static") for t in (one, two))
            assert np.array_equal(first, second)
            assert one.input_steps[key] == two.input_steps[key]


def test_prompts_and_text_are_samples_too(bundle: Path, images: Path, tmp_path: Path) -> None:
    lines = [{"image": f"{i:02}.png", "prompt": f"Is it {i}?"} for i in range(6)]
    lines.append({"prompt": "No image at all."})
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = gather(Bundle.open(bundle), Given(images, file, TEXT), Settings(window=24), silent)
    prompts = [s.prompt for s in found.calibrating if s.ids is None]
    assert prompts == [f"Is it {i}?" for i in (0, 1, 2, 4, 5)] + ["No image at all."]
    texts = [s for s in found.calibrating if s.ids is not None]
    assert len(texts) == 24
    assert len(found.held_out) == 1 + 8
    assert chosen(bundle, images)[0].prompt == QUESTION
    result = calibrated(
        bundle, tmp_path / "q", images=images, prompts=file, text=TEXT, window=24, windows=3
    )
    assert result.plan.samples == 6 + 3
    one = calibrated(bundle, tmp_path / "one", text=TEXT, window=24, keep_float=KEEP_VISION)
    assert {path.split("/")[0] for path in one.plan.ranges} == {"lm"}
    api.build_engine(tmp_path / "one", tmp_path / "e")


KEEP_VISION = ("encoder.*", "merger/*")


def test_images_are_spread_over_the_folder(bundle: Path, images: Path) -> None:
    found = gather(Bundle.open(bundle), Given(images), Settings(samples=5), silent)
    names = [s.image.name for s in (*found.calibrating, *found.held_out) if s.image]
    assert sorted(names) == ["00.png", "02.png", "04.png", "06.png", "08.png"]


# -- SmoothQuant, bias correction --------------------------------------------------------------


@pytest.mark.parametrize(("role", "kind"), EVERY)
def test_smoothing_changes_nothing_in_float(role: str, kind: str) -> None:
    part, inputs = component(role, kind), feed(component(role, kind))
    weights, generator = tensors(part), np.random.default_rng(4)
    links = smooth.links(part, AXES)
    found = {}
    for link in links:
        outlying = generator.uniform(0.01, 30, part.shapes[link.source + "weight"][-1])
        found[link.source] = smooth.scales(link, outlying.astype(np.float32), weights, 0.5)
    changed = smooth.smoothed(weights, found, links)
    expected = part.forward(NumpyOps(), Weights(weights), inputs)
    actual = part.forward(NumpyOps(), Weights(changed), inputs)
    for name, array in expected.items():
        assert relative_difference(actual[name], array) < 2e-5, name
    if (role, kind) in (("encoders", "clip"), ("lms", "llama"), ("encoders", "convnext")):
        assert len(links) >= 4
    if role == "lms":  # also behind the SwiGLU
        read = {key for link in links for key in link.linears}
        assert {"layers.0.attention.q.weight", "layers.0.mlp.up.weight"} <= read
        assert "layers.1.mlp.down.weight" in read


def test_smoothing_helps_where_channels_are_outliers(bundle: Path, images: Path) -> None:
    """A channel of every norm thirty times the others, its weights as much smaller."""
    source = systems.load(bundle, Options())
    weights = {name: dict(store) for name, store in source.weights.items()}
    model = source.model
    part = next(p for p in Chain(model, Bundle.open(bundle).tokenizer()).parts if "clip" in p.name)
    for link in smooth.links(part, AXES):
        own = weights[part.name]
        assert link.through is None
        for leaf in ("weight", "bias"):
            own[link.source + leaf] = own[link.source + leaf].copy()
            own[link.source + leaf][3] *= 30
        for key in link.linears:
            own[key] = own[key].copy()
            own[key][3] /= 30
    plan = plan_of(model, Settings("int8-static"))
    loud = replace(source, weights=weights)
    samples = gather(Bundle.open(bundle), Given(images), Settings(), silent)
    plain = calibrator(bundle, range="minmax").run(loud, plan, samples)
    better = calibrator(bundle, range="minmax", smooth=0.5).run(loud, plan, samples)
    assert better.smoothed >= 8
    first, second = (one.whole.components["encoder.clip"].relative_rms for one in (plain, better))
    assert second < 0.6 * first


def test_bias_correction_takes_the_mean_error_away(bundle: Path, images: Path) -> None:
    source = systems.load(bundle, Options())
    plan = plan_of(source.model, Settings("int8-static"))
    samples = chosen(bundle, images)
    made = calibrator(bundle)
    plan = replace(plan, ranges=made.ranges(source.weights, plan, samples))
    biases = made._biases(source.weights, plan, samples)
    assert biases["encoder.clip"]
    assert "lm" not in biases  # its linears have none
    means = []
    for corrected in ({}, biases):
        whole = Whole()
        by = made._errors(source.weights, corrected, plan, whole)
        for sample in samples:
            made._chain.run_all([sample], by)
        means.append({path: np.abs(e.shift / e.rows).max() for path, e in whole.layers.items()})
    for key in biases["encoder.clip"]:
        path = "encoder.clip/" + key.removesuffix(".bias")
        path = path.replace(".attention.", "/attention/").replace(".mlp.", "/mlp/")
        assert means[1][path] < 0.05 * means[0][path] + 1e-6


def test_wrong_kernels_are_refused_whatever_loss_is_accepted(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(bundle, tmp_path / "q", images=images)
    right = check._answers

    def wrong(*given: Any) -> Any:
        answers = right(*given)
        return [
            {name: replace(answer, values=0.7 * answer.values) for name, answer in one.items()}
            for one in answers
        ]

    monkeypatch.setattr(check, "_answers", wrong)
    with pytest.raises(AccuracyError, match="differs from the reference by 0.3"):
        api.build_engine(tmp_path / "q", tmp_path / "f", accept_loss=0.5)


# -- what cannot be ----------------------------------------------------------------------------


def test_broken_and_missing_samples_are_named(bundle: Path, images: Path, tmp_path: Path) -> None:
    few = draw(tmp_path / "few", 3)
    with pytest.raises(CalibrationError, match="has 3 samples, at least 4 are needed"):
        calibrated(bundle, tmp_path / "q", images=few)
    mixed = draw(tmp_path / "mixed", 8)
    (mixed / "odd.png").write_bytes(b"no image")
    (mixed / "worse.jpg").write_bytes((mixed / "00.png").read_bytes()[:60])
    (mixed / "notes.txt").write_text("not an image, and not taken for one")
    lines: list[str] = []
    with pytest.raises(CalibrationError, match=r"2 of 10 images cannot be decoded: .*odd\.png.*"):
        calibrated(bundle, tmp_path / "q", images=mixed, progress=lines.append)
    assert sum("left out" in line for line in lines) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="has no images"):
        calibrated(bundle, tmp_path / "q", images=tmp_path / "empty")
    with pytest.raises(CalibrationError, match="is not a folder"):
        calibrated(bundle, tmp_path / "q", images=tmp_path / "nowhere")
    assert not (tmp_path / "q").exists()


def test_one_broken_image_of_a_hundred_is_left_out(
    bundle: Path, images: Path, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for number in range(99):
        (many / f"{number:03}.png").symlink_to(images / "00.png")
    (many / "odd.png").write_bytes(b"no image")
    found = gather(Bundle.open(bundle), Given(many), Settings(samples=100), silent)
    assert (len(found.calibrating), len(found.held_out)) == (91, 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: '{' is no sample"),
        ('{"image": "00.png"}', "is no sample"),
        ('{"image": 3, "prompt": "x"}', "image = 3"),
        ('{"image": "00.png", "prompt": "x", "answer": "y"}', "unknown key 'answer'"),
    ],
)
def test_lines_of_prompts_are_checked(
    line: str, message: str, bundle: Path, images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"image": "00.png", "prompt": "x"}\n' + line)
    with pytest.raises(CalibrationError, match=message):
        gather(Bundle.open(bundle), Given(images, file), Settings(), silent)


def test_prompts_with_a_slot_too_many_are_named(bundle: Path, images: Path, tmp_path: Path) -> None:
    lines = [{"image": f"{i:02}.png", "prompt": "What is it?"} for i in range(4)]
    lines.append({"prompt": "An <image> that is not there"})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen: list[str] = []
    with pytest.raises(CalibrationError, match=r"'An <image> that.*has 1 image slot"):
        given = {"prompts": tmp_path / "p.jsonl", "progress": seen.append}
        calibrated(bundle, tmp_path / "q", images=images, **given)
    assert seen == []


def test_a_component_that_no_sample_reaches_is_named(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no sample reaches encoder\.clip"):
        calibrated(bundle, tmp_path / "q", text=TEXT, window=24)
    with pytest.raises(CalibrationError, match="there are no samples"):
        calibrated(bundle, tmp_path / "q")


@pytest.mark.parametrize(("factor", "message"), [(0.0, "is zero for every"), (np.nan, "no number")])
def test_dead_and_infinite_inputs_are_named(
    factor: float, message: str, bundle: Path, images: Path
) -> None:
    source = systems.load(bundle, Options())
    plan = plan_of(source.model, Settings("int8-static"))
    weights = {name: dict(store) for name, store in source.weights.items()}
    for leaf in ("weight", "bias"):
        weights["merger"][f"linears.0.{leaf}"] = weights["merger"][f"linears.0.{leaf}"] * factor
    with pytest.raises(CalibrationError, match=rf"the input of merger/linears\.1 .*{message}"):
        calibrator(bundle).ranges(weights, plan, chosen(bundle, images))
    spared = plan_of(source.model, Settings("int8-static", keep_float=("merger/linears.1", "lm/*")))
    if factor == 0:
        found = calibrator(bundle).ranges(weights, spared, chosen(bundle, images))
        assert "merger/linears.1" not in found


def test_settings_that_cannot_be(bundle: Path, images: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"range": "max"}, "--range 'max'"),
        ({"smooth": 1.5}, "--smooth 1.5"),
        ({"samples": 1}, "--samples 1"),
        ({"block": 64}, "--block has no meaning for --to int8-static"),
        ({"keep_float": ("lm/nothing",)}, "--keep-float lm/nothing matches no layer"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibrated(bundle, tmp_path / "q", images=images, **changes)
    with pytest.raises(ConfigError, match="--smooth has no meaning for --to int4"):
        api.calibrate(bundle, tmp_path / "q", text=TEXT, smooth=0.5)
    with pytest.raises(ConfigError, match="--to int8 is calibrated with text alone"):
        api.calibrate(bundle, tmp_path / "q", images=images, to="int8")
    calibrated(bundle, tmp_path / "q", images=images, keep_float=("lm/*",))
    with pytest.raises(ConfigError, match="is quantized already"):
        calibrated(tmp_path / "q", tmp_path / "r", images=images)


def test_the_output_layer_stays_in_float_and_made_weights_too() -> None:
    for name in ("comm-7b", "convllava-7b-768"):
        model = systems.find(systems.presets()[name]).PRESETS[name]()
        plan, layers = plan_of(model, Settings("int8-static")), layers_of(model)
        assert plan.at("lm/head") == "float"
        assert plan.at("lm/layers.0/mlp/up") == "int8"
        assert all(plan.at(path) == "float" for path in layers.made)
        assert bool(layers.made) == (name == "comm-7b")


def test_the_verb_writes_a_report(bundle: Path, images: Path, tmp_path: Path) -> None:
    report, out = tmp_path / "r.json", tmp_path / "q"
    arguments = ["calibrate", bundle, out, "--images", images, "--to", "int8-static"]
    arguments += ["--range", "minmax", "--keep-float", "lm/layers.1/*", "--report", report]
    found = CliRunner().invoke(cli.app, [*map(str, arguments), "--smooth", "0.5"])
    assert found.exit_code == 0, found.output
    assert "layers that cost most" in found.output
    data = json.loads(report.read_text())
    assert (data["method"], data["samples"], data["held_out"]) == ("minmax", 7, 2)
    assert data["smoothed"] > 6
    assert {c["name"] for c in data["components"]} == {"encoder.clip", "merger", "lm"}
    assert (data["answers"]["prompts"], data["answers"]["tokens"]) == (2, greedy.ANSWER)
    assert 0 <= data["answers"]["same_tokens"] <= greedy.ANSWER
    assert data["latency"] == []  # not asked for
    for part in data["components"]:
        assert part["bytes_after"] < part["bytes_before"]
    assert not [layer for layer in data["layers"] if layer["path"].startswith("lm/layers.1/")]


def test_the_budget_leaves_the_worst_layers_in_float(bundle: Path, tmp_path: Path) -> None:
    given = {"text": TEXT, "window": 24, "windows": 6, "keep_float": KEEP_VISION}
    plain = calibrated(bundle, tmp_path / "plain", **given)
    assert plain.within_budget
    assert not any(layer.in_float for layer in plain.layers)
    assert plain.growth == pytest.approx(np.expm1(plain.kl))
    assert plain.tokens == 8 * 23  # the last of a window has no next
    assert plain.perplexity != plain.perplexity_float
    lines: list[str] = []
    found = calibrated(bundle, tmp_path / "q", budget=1e-9, progress=lines.append, **given)
    spared = [layer.path for layer in found.layers if layer.in_float]
    assert spared
    assert found.layers[0].path in spared
    assert not found.within_budget
    assert found.growth < plain.growth
    assert set(found.plan.ranges) == {layer.path for layer in found.layers} - set(spared)
    assert sum("layers in float" in line for line in lines) == 3 * 2
    made = api.build_engine(tmp_path / "q", tmp_path / "e", accept_loss=0.5)
    assert made.plan.at(spared[0]) == "float"
    loose = calibrated(bundle, tmp_path / "r", budget=10.0, **given)
    assert loose.plan == plain.plan


def test_samples_together_give_what_each_gives(bundle: Path, images: Path) -> None:
    opened = Bundle.open(bundle)
    chain, weights = (
        Chain(opened.vlm, opened.tokenizer()),
        systems.load(bundle, Options()).weights,
    )
    files = sorted(images.iterdir())
    samples = [
        Sample(files[0]),
        Sample(files[1]),
        Sample(None, "No image."),
        Sample(files[2], "Another length?"),
        Sample(ids=np.arange(24) % 40),
        Sample(ids=np.arange(1, 25) % 40),
    ]
    by = Passage(weights, in_numpy())
    together = chain.run_all(samples, by)
    for sample, found in zip(samples, together, strict=True):
        alone = chain.run(sample, by)
        assert alone.keys() == found.keys()
        for name, outputs in alone.items():
            for port, array in outputs.items():
                assert relative_difference(found[name][port], array) < 1e-5
    assert "lm" not in chain.run_all(samples, by, language=False)[0]
