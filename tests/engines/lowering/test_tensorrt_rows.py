"""TensorRT's rows, without TensorRT: what they leave is standard ONNX, which ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgevlm.calibration import weight_only
from edgevlm.engines.backends import sessions
from edgevlm.engines.backends.tensorrt import builder, codes
from edgevlm.engines.lowering.lower import decide, lower
from edgevlm.engines.lowering.tensorrt_lint import check
from edgevlm.export import write
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.goldens import reference, relative_rms
from edgevlm.toolkit.bundle.manifest import Tensors
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule
from edgevlm.toolkit.target import Target
from tests.onnx_tools import model_of, run
from tests.ops_cases import CASES
from tests.toolkit.models.test_architectures import FILES, component, feed, tensors
from tests.toolkit.ops.test_wrappers import largest

Release = tuple[int, ...]
RELEASES: list[Release] = [(10, 3), (10, 13), (10, 16), (11, 4)]
ARCHITECTURES: dict[Release, str] = {
    (10, 3): "sm_87",
    (10, 13): "sm_110",
    (10, 16): "sm_87",
    (11, 4): "sm_90",
}
NEW_OPS = {
    "Attention": (10, 14),
    "RotaryEmbedding": (10, 15),
    "RMSNormalization": (10, 15),
    "TensorScatter": (10, 15),
    "Swish": (11,),
}
SIBLINGS = sorted(name for name in systems.presets() if "0.5b" in name)
EVERY = FILES
PLANS = {name: weight_only.plan(name) for name in ("int8-rows", "int8-blocks", "int4-blocks")}
PLANS["zero points"] = PrecisionPlan(
    "int8_weights", (Rule("*/layers.*", "int4_weights", zero_points=True),)
)


def target(release: tuple[int, ...]) -> Target:
    return Target("tensorrt", release, ARCHITECTURES[release])


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_op_equals_the_reference(name: str, release: tuple[int, ...]) -> None:
    case = CASES[name]
    where = Target("tensorrt", release, "sm_90") if "fp8" in name else target(release)
    model = lower(model_of(case.component(), case.weights()), where)
    onnx.checker.check_model(model, full_check=True)
    kinds = {node.op_type for node in model.graph.node}
    assert not {op for op, since in NEW_OPS.items() if release < since} & kinds
    assert not model.functions
    found, expected = run(model, case.feed()), case.outputs()
    for output, rows in case.matters.items():
        found[output], expected[output] = found[output] * rows, expected[output] * rows
    for output, array in expected.items():
        scale = max(1.0, float(np.abs(array).max()))
        np.testing.assert_allclose(found[output], array, atol=2e-6 * scale, rtol=0)


@pytest.mark.parametrize(
    ("release", "opset"), [((10, 3), 21), ((10, 13), 21), ((10, 14), 23), ((10, 16), 24)]
)
def test_the_opset_is_one_that_the_release_reads(release: tuple[int, ...], opset: int) -> None:
    case = CASES["attention_cached prompt"]
    model = lower(model_of(case.component(), case.weights()), Target("tensorrt", release, "sm_87"))
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]


@pytest.mark.parametrize(
    ("rtx", "release"),
    [((1, 4), (10, 16)), ((1, 5), (11, 1)), ((1, 7, 1), (11, 4)), ((1, 9), (11, 4))],
)
def test_rtx_takes_what_the_tensorrt_of_its_time_does(
    rtx: tuple[int, ...], release: tuple[int, ...]
) -> None:
    case = CASES["swiglu"]
    graphs = [
        lower(model_of(case.component(), case.weights()), Target(backend, version, "sm_89"))
        for backend, version in (("tensorrt-rtx", rtx), ("tensorrt", release))
    ]
    assert graphs[0] == graphs[1]
    assert ("Swish" in {n.op_type for n in graphs[0].graph.node}) == (release >= (11,))


@pytest.mark.parametrize("preset", SIBLINGS)
def test_every_preset_lowers_for_every_release(preset: str) -> None:
    source = systems.preset(preset, 0, Options())
    for dtype in ("fp16", "fp32"):
        for name, graph in write.graphs(source, dtype).items():
            for release in RELEASES:
                decisions = decide(name, graph, target(release))
                assert {d.action for d in decisions} <= {"keep", "swap", "decompose"}


@pytest.mark.parametrize("release", [(10, 3), (11, 4)])
@pytest.mark.parametrize("plan", sorted(PLANS))
@pytest.mark.parametrize(("role", "kind"), EVERY)
def test_weights_in_codes_are_signed_and_mean_the_same(
    role: str, kind: str, plan: str, release: tuple[int, ...], tmp_path: Path
) -> None:
    part, inputs = component(role, kind), feed(component(role, kind))
    recorded = write.record(part, "fp32", PLANS[plan])
    written = write._write_weights(tmp_path / "w.safetensors", recorded, tensors(part))
    model = lower(recorded.model("w.safetensors", written), target(release))
    stored = {t.name: t.data_type for t in model.graph.initializer}
    assert not {TensorProto.UINT8, TensorProto.UINT4} & set(stored.values())
    codes.write(tmp_path / "w.safetensors", tmp_path / "signed.safetensors", model)
    expected = part.forward(NumpyOps(), Weights(Tensors(tmp_path / "w.safetensors")), inputs)
    found = _run(model, tmp_path, inputs)
    for port in part.outputs:
        if not port.updates:
            assert relative_rms([(found[port.name], expected[port.name])]) < 1e-5, port.name


def _run(model: onnx.ModelProto, folder: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """As the graph says: ONNX Runtime would join DequantizeLinear and MatMul and round inputs."""
    options = sessions.read_weights_from(sessions.session_options(1), folder)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    opened = sessions.open_session(model.SerializeToString(), options)
    known = {value.name for value in opened.get_inputs()}
    names = [output.name for output in opened.get_outputs()]
    found = opened.run(names, {k: v for k, v in inputs.items() if k in known})
    return dict(zip(names, found, strict=True))


def test_scales_of_zero_become_numbers_that_the_builder_takes(tmp_path: Path) -> None:
    part = component("mergers", "mlp")
    weights = {name: np.zeros_like(array) for name, array in tensors(part).items()}
    recorded = write.record(part, "fp16", PLANS["int8-rows"])
    written = write._write_weights(tmp_path / "w.safetensors", recorded, weights)
    model = lower(recorded.model("w.safetensors", written), Target("tensorrt", (11, 4), "sm_90"))
    codes.write(tmp_path / "w.safetensors", tmp_path / "signed.safetensors", model)
    file = SafetensorsFile(tmp_path / "signed.safetensors")
    scales = [file.read(name) for name in file.entries if name.endswith(".scale")]
    assert scales
    assert all((scale > 0).all() for scale in scales)


def _graph(
    nodes: list[onnx.NodeProto], constants: Mapping[str, Array | TensorProto], domain: str = ""
) -> onnx.ModelProto:
    tensors = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(value, name)
        for name, value in constants.items()
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])


def _fp8(kind: str, code: int) -> TensorProto:
    return helper.make_tensor("z", TensorProto.DataType.Value(kind), [], bytes([code]), raw=True)


def _rounded(zero: Array | TensorProto) -> onnx.ModelProto:
    return _graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], name="round")],
        {"s": np.asarray(0.1, np.float32), "z": zero},
    )


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_rounded(np.asarray(0, np.uint8)), "round: codes of type UINT8"),
        (_rounded(np.asarray(5, np.int8)), "round: a zero point other than 0"),
        (_rounded(_fp8("FLOAT8E5M2", 0)), "round: codes of type FLOAT8E5M2"),
        (_rounded(_fp8("FLOAT8E4M3FNUZ", 0)), "round: codes of type FLOAT8E4M3FNUZ"),
        (_rounded(_fp8("FLOAT8E4M3FN", 1)), "round: a zero point other than 0"),
        (
            _graph(
                [helper.make_node("QuantizeLinear", ["x", "s"], ["y"], name="round")],
                {"s": np.asarray(0.1, np.float32)},
            ),
            "round: without a zero point",
        ),
        (
            _graph(
                [helper.make_node("Softmax", ["s"], ["y"], name="shares")],
                {"s": np.ones(3, np.float32)},
            ),
            "shares: Softmax of one axis",
        ),
        (
            _graph(
                [
                    helper.make_node("Shape", ["x"], ["axes"], name="shape"),
                    helper.make_node("ReduceSum", ["x", "axes"], ["y"], name="sum"),
                ],
                {},
            ),
            "sum: axes that are computed",
        ),
        (
            _graph(
                [helper.make_node("RotaryEmbedding", ["x"], ["y"], "r", domain="com.microsoft")], {}
            ),
            "r: com.microsoft.RotaryEmbedding, taken for the standard op",
        ),
        (
            _graph(
                [helper.make_node("TensorScatter", ["c", "x", "i"], ["y"], name="w", axis=2)],
                {"c": np.zeros((1, 1, 4, 4), np.float32), "i": np.zeros(1, np.int64)},
            ),
            "w: a cache that is not an input",
        ),
    ],
)
def test_what_would_fail_or_be_wrong_is_found_first(model: onnx.ModelProto, reason: str) -> None:
    with pytest.raises(UnsupportedError, match="m cannot become an engine for tensorrt") as caught:
        check("m", model, Target("tensorrt", (11, 4), "sm_90"))
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("dtype", "arch", "reason"),
    [
        ("bf16", "sm_75", "bf16 does not exist on sm_75"),
        ("fp32", "sm_75", "products in fp32 do not exist on sm_75"),
        ("fp16", "sm_75", ""),
        ("bf16", "sm_80+sm_75", "bf16 does not exist on sm_75"),
        ("bf16", "sm_80", ""),
    ],
)
def test_formats_that_a_card_lacks(dtype: str, arch: str, reason: str) -> None:
    part = component("mergers", "mlp")
    model = write._unwritten(write.record(part, dtype))
    graph = write.record(part, dtype).model("", model)
    where = Target("tensorrt-rtx", (1, 7), arch)
    if not reason:
        lower(graph, where)
        return
    with pytest.raises(UnsupportedError, match=reason):
        lower(graph, where)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    ("role", "kind"), [("encoders", "clip"), ("encoders", "convnext"), ("lms", "qwen2")]
)
def test_fp8_stays_as_it_was_recorded(
    role: str, kind: str, release: Release, tmp_path: Path
) -> None:
    part, inputs = component(role, kind), feed(component(role, kind))
    weights = tensors(part)
    plan = PrecisionPlan("fp8", (Rule("lm/head", "float"),), largest(part, weights, inputs))
    recorded = write.record(part, "fp32", plan)
    written = write._write_weights(tmp_path / "w.safetensors", recorded, weights)
    model = lower(recorded.model("w.safetensors", written), Target("tensorrt", release, "sm_90"))
    assert not codes.needed(model)  # the parser takes the bundle's own bytes
    sites = builder.products_in_8_bits(model)
    assert set(sites.values()) == {"FP8"}
    assert set(sites) == set(plan.ranges) - {"lm/head"}
    file = Tensors(tmp_path / "w.safetensors")
    expected = part.forward(reference(part.name, file), Weights(file), inputs)
    found = _run(model, tmp_path, inputs)
    for port in part.outputs:
        if not port.updates:
            assert relative_rms([(found[port.name], expected[port.name])]) < 1e-2, port.name


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_87", "sm_75", "sm_86+sm_89"])
def test_cards_without_fp8_refuse_it_with_what_mends_it(arch: str) -> None:
    part = component("mergers", "mlp")
    plan = PrecisionPlan("fp8", (), largest(part, tensors(part), feed(part)))
    recorded = write.record(part, "fp16", plan)
    graph = recorded.model("", write._unwritten(recorded))
    lower(graph, Target("tensorrt-rtx", (1, 7), "sm_89+sm_120"))
    graph = recorded.model("", write._unwritten(recorded))
    with pytest.raises(UnsupportedError, match="FP8 does not exist on sm_") as caught:
        lower(graph, Target("tensorrt-rtx", (1, 7), arch))
    assert "--to int8-static" in caught.value.hint


@pytest.mark.parametrize("release", RELEASES)
def test_a_residual_reads_what_its_convolution_does(release: Release) -> None:
    """Blocks of ConvNeXt: so the builder writes what both read once, not in two orders of axes."""
    part = component("encoders", "convnext")
    model = lower(model_of(part, tensors(part)), target(release))
    makers = {name: node for node in model.graph.node for name in node.output}
    convolutions = [n for n in model.graph.node if n.name.endswith("/depthwise")]
    assert len(convolutions) == 4
    for node in convolutions:
        block = node.name.rpartition("/")[0]
        (first,) = [name for name in node.input if name in makers]
        backs = [n for n in model.graph.node if n.op_type == "Transpose" and first in n.input]
        read = {name for n in model.graph.node if n.op_type == "Add" for name in n.input}
        assert [back.output[0] in read for back in backs] == [True], block
        assert makers[first].input[0] not in read
