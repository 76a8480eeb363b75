"""The rows for ONNX Runtime on a card, without one: what they leave runs on the processor too.

Kernels of fp16 are few there; ONNX Runtime puts casts around the others. Of bf16 it has too few to
run: such graphs are linted, and their types resolved.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgevlm.engines.backends import sessions
from edgevlm.engines.lowering import capabilities, float_ports
from edgevlm.engines.lowering import onnxruntime_cuda_rows as rows
from edgevlm.engines.lowering.graph import attribute
from edgevlm.engines.lowering.lower import decide, lower
from edgevlm.engines.lowering.onnxruntime_cuda_lint import check
from edgevlm.export import write
from edgevlm.toolkit import models, systems
from edgevlm.toolkit.bundle.goldens import relative_rms
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.checkpoints.safetensors_io import Entry, Written, to_bfloat16
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.target import DEVICES, Target, parse
from edgevlm.toolkit.vlm.components import Component
from tests.ops_cases import CASES
from tests.toolkit.models.test_architectures import component, feed, tensors

CARD = Target("onnxruntime-cuda", (1, 31, 1), "sm_89")
TELLS = hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")
pytestmark = pytest.mark.skipif(not TELLS, reason="the backend needs ONNX Runtime 1.24")
EVERY = [(role, kind) for role in ("encoders", "mergers", "lms") for kind in models.kinds(role)]
SIBLINGS = sorted(name for name in systems.presets() if "0.5b" in name)
# Relative to the largest value: sums in fp16 of ops one after another.
LIMITS = {"fp32": 3e-6, "fp16": 1e-2}
TYPES: Mapping[str, type[np.floating]] = {"fp32": np.float32, "fp16": np.float16}
STATIC = ("fake_quant", "fake_quant per channel", "fake_quant to fp8")  # which are refused


def recorded(part: Component, weights: Mapping[str, Array], dtype: str) -> onnx.ModelProto:
    """The portable graph with its weights inside."""
    made = write.record(part, dtype)
    values = {name: np.asarray(weights[name]) for name in part.shapes} | made.ops.constants
    spec = {t.name: t for t in made.planned()}
    entries = {name: Entry(spec[name].dtype, a.shape, 0) for name, a in values.items()}
    model = made.model("weights", Written(entries, "", 0))
    kinds = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            kind, value = kinds.get(tensor.data_type), values[tensor.name]
            if tensor.data_type == TensorProto.BFLOAT16:
                content = to_bfloat16(value).tobytes()
                name, bf16 = tensor.name, TensorProto.BFLOAT16
                tensor.CopyFrom(helper.make_tensor(name, bf16, value.shape, content, raw=True))
                continue
            value = value if kind is None else value.astype(kind)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def run(model: onnx.ModelProto, inputs: Mapping[str, Array], dtype: str) -> dict[str, Array]:
    """What ONNX Runtime's own kernels for the processor make of a graph, as float32."""
    session = sessions.open_session(model.SerializeToString(), sessions.session_options(1))
    names = [output.name for output in session.get_outputs()]
    known = {value.name for value in session.get_inputs()}
    given = {k: v for k, v in inputs.items() if k in known}
    given = {k: v.astype(TYPES[dtype]) if v.dtype.kind == "f" else v for k, v in given.items()}
    found = session.run(names, given)
    return {name: np.asarray(a, np.float32) for name, a in zip(names, found, strict=True)}


def test_every_kernel_is_of_the_version_that_the_graph_asks_for() -> None:
    """A newer version would run on the processor, silently."""
    opset = capabilities.of(CARD).opset
    for op, version in rows.KERNELS.items():
        assert onnx.defs.get_schema(op, max_inclusive_version=opset).since_version == version, op
    every = [(op, row) for op, first in rows.ROWS.items() for row in first.alternatives()]
    kept = {op for op, row in every if row.action == "keep"}
    assert kept == {*rows.KERNELS, *rows.GONE}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", sorted(set(CASES) - set(STATIC)))
def test_every_op_equals_the_reference(name: str, dtype: str) -> None:
    case = CASES[name]
    model = lower(recorded(case.component(), case.weights(), dtype), CARD)
    assert [(o.domain, o.version) for o in model.opset_import if not o.domain] == [("", 23)]
    assert not model.functions
    found, expected = run(model, case.feed(), dtype), case.outputs()
    for output, places in case.matters.items():
        found[output], expected[output] = found[output] * places, expected[output] * places
    for output, array in expected.items():
        limit = LIMITS[dtype] * max(1.0, float(np.abs(array).max()))
        np.testing.assert_allclose(found[output], array, atol=limit, rtol=0)


def resolves(model: onnx.ModelProto) -> None:
    """Fail unless ONNX Runtime finds the types of a graph consistent; it may lack kernels then."""
    try:
        sessions.open_session(model.SerializeToString(), sessions.session_options(1))
    except Exception as lacking:
        assert "Could not find an implementation" in str(lacking)


@pytest.mark.parametrize("name", sorted(set(CASES) - set(STATIC)))
def test_types_of_every_op_resolve_in_bf16(name: str) -> None:
    case = CASES[name]
    resolves(lower(recorded(case.component(), case.weights(), "bf16"), CARD))


@pytest.mark.parametrize(("role", "kind"), EVERY)
def test_types_of_every_architecture_resolve_in_bf16(role: str, kind: str) -> None:
    """With float32 for callers; states keep the model's format."""
    part = component(role, kind)
    model = lower(recorded(part, tensors(part), "bf16"), CARD)
    updates = {port.name: port.updates for port in part.outputs if port.updates}
    states = {*updates, *updates.values()}
    float_ports.widen(model, states)
    resolves(model)
    values = {
        v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)
    }
    for port in (*part.inputs, *part.outputs):
        if port.dtype == "float":
            kept = port.name in states
            assert values[port.name] == (TensorProto.BFLOAT16 if kept else TensorProto.FLOAT)


def test_a_graph_of_mixed_types_does_not_resolve() -> None:
    ports = [helper.make_tensor_value_info(n, k, [2]) for n, k in (("x", 1), ("h", 10), ("y", 1))]
    node = helper.make_node("Add", ["x", "h"], ["y"], "mixed")
    graph = helper.make_graph([node], "g", ports[:2], ports[2:])
    opsets = [helper.make_opsetid("", 23)]
    with pytest.raises(AssertionError):
        resolves(helper.make_model(graph, opset_imports=opsets, ir_version=11))


@pytest.mark.parametrize("name", STATIC)
def test_static_8_bits_are_refused_with_the_reason(name: str) -> None:
    case = CASES[name]
    with pytest.raises(UnsupportedError, match="no products of inputs in INT8 or FP8"):
        lower(recorded(case.component(), case.weights(), "fp32"), CARD)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("role", "kind"), EVERY)
def test_every_architecture_equals_the_reference(role: str, kind: str, dtype: str) -> None:
    part, inputs = component(role, kind), feed(component(role, kind))
    weights = tensors(part)
    found = run(lower(recorded(part, weights, dtype), CARD), inputs, dtype)
    rounded = {k: v.astype(TYPES[dtype]).astype(np.float32) for k, v in weights.items()}
    expected = part.forward(NumpyOps(), Weights(rounded), inputs)
    for port in part.outputs:
        if not port.updates:
            error = relative_rms([(found[port.name], np.asarray(expected[port.name]))])
            assert error < {"fp32": 1e-5, "fp16": 1e-2}[dtype], port.name


@pytest.mark.parametrize("preset", SIBLINGS)
def test_every_preset_lowers_in_every_format(preset: str) -> None:
    """And attends to its cache in one kernel in the formats that it takes."""
    source = systems.preset(preset, 0, Options())
    for dtype, kernel in (("fp16", True), ("bf16", True), ("fp32", False)):
        for name, graph in write.graphs(source, dtype).items():
            decisions = decide(name, graph, CARD)
            assert {d.action for d in decisions} <= {"keep", "swap", "decompose"}
            cached = [d.into for d in decisions if d.op == "edgevlm.CachedAttention"]
            into = "com.microsoft.GroupQueryAttention" if kernel else "ScatterElements"
            assert cached == ([into] if name == "lm" else [])


def test_what_the_kernel_reads_on_the_processor_comes_from_a_shape() -> None:
    """Else it would be copied from the card in every call, which no CUDA graph can hold."""
    case = CASES["attention_cached one token"]
    model = lower(recorded(case.component(), case.weights(), "fp16"), CARD)
    makers = {name: node for node in model.graph.node for name in node.output}
    (attend,) = [n for n in model.graph.node if n.op_type == "GroupQueryAttention"]
    ops, name = [], attend.input[6]
    while name in makers:
        ops.append(makers[name].op_type)
        name = makers[name].input[0]
    assert ops == ["Max", "Cast", "Shape"]
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    tables = [makers[name] for name in attend.input[7:9]]
    assert [node.attribute[0].i for node in tables] == [TensorProto.FLOAT16] * 2
    assert {kinds[node.input[0]] for node in tables} == {TensorProto.FLOAT}


@pytest.mark.parametrize("arch", ["sm_87", "sm_110", "sm_100"])
def test_a_card_without_kernels_is_refused_with_the_target_that_has(arch: str) -> None:
    case = CASES["add"]
    graph = recorded(case.component(), case.weights(), "fp16")
    with pytest.raises(UnsupportedError, match=f"no kernels for {arch}") as refused:
        lower(graph, Target("onnxruntime-cuda", (), arch))
    name = refused.value.hint.rpartition(" ")[2]
    assert name in DEVICES
    assert parse(name).arch == arch
    assert parse(name).backend == "tensorrt"


def _one(op: str, kind: int, stored: bool = False) -> onnx.ModelProto:
    """A graph of one op on one input, which is computed or, if `stored`, a constant."""
    port = helper.make_tensor_value_info("x", kind, [2, 2, 2, 2])
    inputs = ["c"] if stored else ["x"] * (2 if op == "GridSample" else 1)
    node = helper.make_node(op, inputs, ["y"], "it")
    constants = [helper.make_tensor("c", kind, [2], [1.0, 2.0])] if stored else []
    return helper.make_model(helper.make_graph([node], "g", [port], [], constants))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_one("Cos", TensorProto.FLOAT), "it: Cos of what is computed"),
        (_one("Cos", TensorProto.FLOAT, stored=True), ""),
        (_one("GridSample", TensorProto.FLOAT16), "it: GridSample in fp16"),
        (_one("GridSample", TensorProto.FLOAT), ""),
        (_one("ReduceMean", TensorProto.BFLOAT16), "it: ReduceMean in bf16"),
        (_one("Round", TensorProto.FLOAT), ""),
    ],
)
def test_what_would_run_on_the_processor_is_found_first(
    model: onnx.ModelProto, reason: str
) -> None:
    if not reason:
        check("m", model, CARD)
        return
    with pytest.raises(UnsupportedError, match="m would not run on onnxruntime-cuda") as caught:
        check("m", model, CARD)
    assert reason in caught.value.message


@pytest.mark.parametrize(("dtype", "fits"), [("bf16", False), ("fp16", True)])
def test_formats_that_a_card_lacks(dtype: str, fits: bool) -> None:
    part = component("mergers", "mlp")
    made = write.record(part, dtype)
    graph, where = made.model("", write._unwritten(made)), Target(CARD.backend, (), "sm_75")
    if fits:
        lower(graph, where)
        return
    with pytest.raises(UnsupportedError, match="bf16 does not exist on sm_75"):
        lower(graph, where)


def test_weights_by_channel_are_declared_by_output() -> None:
    part = component("lms", "llama")
    plan = PrecisionPlan("int8_rows")
    made = write.record(part, "fp16", plan)
    model = lower(made.model("w", write._unwritten(made)), CARD)
    products = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
    assert products
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for node in products:
        k, n, block = (attribute(node, name) for name in ("K", "N", "block_size"))
        assert shapes[node.input[1]] == (n, -(-k // block), block)
        assert shapes[node.input[2]] == (n, -(-k // block))
