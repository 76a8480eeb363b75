"""Calls that stay for plugins: which do, and that their bodies still mean the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from edgevlm.engines.lowering import lower
from edgevlm.engines.lowering.lower import lower_component
from edgevlm.engines.lowering.tensorrt_lint import check
from edgevlm.engines.lowering.tensorrt_rows import ROWS
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.target import Target
from tests.onnx_tools import model_of, run
from tests.ops_cases import CASES

CALLS = {
    "ms_deform_attn": ("MSDeformAttn", "MSDeformAttn"),
    "ms_deform_attn, one level": ("MSDeformAttn", "MSDeformAttn"),
    "layer_merge": ("LayerMerge", "LayerMerge"),
    "attention_rotary": ("RotaryAttention", "RotateHeads"),
}
RELEASES: list[tuple[int, ...]] = [(10, 3), (10, 7), (10, 13), (10, 16), (11, 4), ()]


def lowered(case: str, release: tuple[int, ...], *plugins: str) -> onnx.ModelProto:
    part = CASES[case]
    model = model_of(part.component(), part.weights())
    return lower_component("c", model, Target("tensorrt", release, "sm_87"), plugins).model


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("case", CALLS)
def test_a_call_stays_only_where_its_plugin_is_asked_for(
    case: str, release: tuple[int, ...]
) -> None:
    op, called = CALLS[case]
    assert not any(n.domain for n in lowered(case, release).graph.node)
    others = {name for name, _ in CALLS.values()} - {op}
    assert lowered(case, release, *others) == lowered(case, release)
    model = lowered(case, release, op)
    (call,) = (node for node in model.graph.node if node.domain)
    assert (call.domain, call.op_type) == ("edgevlm", called)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in call.attribute}
    assert attributes["plugin_namespace"] == b"edgevlm"
    assert attributes["plugin_version"] == b"1"
    kept = [function.name for function in model.functions]
    assert kept == ([] if release and release < (10, 7) else [called])


@pytest.mark.parametrize("release", RELEASES[1:])
@pytest.mark.parametrize("case", CALLS)
def test_the_body_is_still_a_way_to_run_it(case: str, release: tuple[int, ...]) -> None:
    part, model = CASES[case], lowered(case, release, CALLS[case][0])
    onnx.checker.check_model(model, full_check=True)
    opsets = {o.version for o in model.opset_import if not o.domain}
    assert opsets == {o.version for f in model.functions for o in f.opset_import}
    taken = lower.rows_of(Target("tensorrt", release, "sm_87"))
    ops = {node.op_type for function in model.functions for node in function.node}
    ways = {op: {row.action for row in taken[op].alternatives()} for op in ops - {"Constant"}}
    assert all("keep" in actions for op, actions in ways.items() if op != "Softmax")
    for name, expected in part.outputs().items():
        np.testing.assert_allclose(run(model, part.feed())[name], expected, atol=3e-6)


def test_the_kernels_get_what_they_have_compiled_in() -> None:
    model = lowered("layer_merge", (11, 4), "LayerMerge")
    (call,) = (node for node in model.graph.node if node.domain)
    found = {a.name: a.i for a in call.attribute if a.type == onnx.AttributeProto.INT}
    assert found == {"levels": 3, "hidden_size": 8, "output_size": 6}


def test_rotation_is_declared_once() -> None:
    part = CASES["attention_rotary"]
    model = model_of(part.component(), part.weights())
    (node,) = (n for n in model.graph.node if n.op_type == "RotaryAttention")
    second = onnx.NodeProto()
    second.CopyFrom(node)
    second.name, second.output[0] = "second", "y_second"
    model.graph.node.append(second)
    model.graph.output.append(onnx.helper.make_tensor_value_info("y_second", 1, None))
    target = Target("tensorrt", (10, 16), "sm_87")
    result = lower_component("c", model, target, ["RotaryAttention"]).model
    assert [f.name for f in result.functions] == ["RotateHeads"]
    names = [n.name for n in result.graph.node if n.op_type == "RotateHeads"]
    assert len(set(names)) == 2


def test_rtx_and_processors_take_no_plugin() -> None:
    part = CASES["layer_merge"]
    for target in (Target("tensorrt-rtx", (1, 7), "sm_89"), Target("onnxruntime", (), "x86_64")):
        model = model_of(part.component(), part.weights())
        with pytest.raises(UnsupportedError, match="takes no plugin for LayerMerge"):
            lower_component("c", model, target, ["LayerMerge"])


def test_an_op_without_a_plugin_is_named() -> None:
    with pytest.raises(UnsupportedError, match="no plugin for SwiGLU") as caught:
        lowered("layer_merge", (11, 4), "SwiGLU")
    assert "LayerMerge" in (caught.value.hint or "")


def test_every_default_is_the_body() -> None:
    assert ROWS["edgevlm.MSDeformAttn"].into == "GridSample"
    assert ROWS["edgevlm.LayerMerge"].action == "decompose"


def test_what_stays_passes_the_lint() -> None:
    for case, (op, _) in CALLS.items():
        check("c", lowered(case, (11, 4), op), Target("tensorrt", (11, 4), "sm_90"))
