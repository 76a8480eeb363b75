"""What a target can do depends on its release: rows, their alternatives, the opset."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest

from edgevlm.engines.lowering import capabilities
from edgevlm.engines.lowering.capabilities import Row
from edgevlm.engines.lowering.lower import decide, lower
from edgevlm.engines.lowering.onnxruntime_rows import ROWS
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.target import Target, parse

OLD, NEW, ANY = (Target("onnxruntime", v, "x86_64") for v in ((1, 23, 2), (1, 24), ()))
NODE = onnx.helper.make_node("Gelu", ["x"], ["y"], name="n", approximate="none")


def never(node: onnx.NodeProto) -> bool:
    return False


def test_since_holds_for_every_alternative() -> None:
    last = Row("decompose", "last")
    later = Row("swap", "later", since=(2, 0), otherwise=last)
    first = Row("keep", "first", since=(3, 0), fits=never, otherwise=later)

    def chosen(*version: int) -> str | None:
        row = first.at(version)
        found = row.choose(NODE) if row else None
        return found.why if found else None

    assert chosen(1, 9) == "last"
    assert chosen(2, 0) == "later"
    assert chosen(3, 1) == "later"  # the first holds, but does not fit
    assert chosen() == "later"  # no version: the newest
    gone = replace(later, otherwise=None)
    assert gone.at((1, 0)) is None
    assert [row.why for row in replace(first, fits=None).at((3, 0)).alternatives()] == [  # type: ignore[union-attr]
        "first", "later", "last",
    ]  # fmt: skip


def test_a_row_may_be_for_some_float_formats() -> None:
    otherwise = Row("decompose", "simple")
    row = Row("swap", "fast", formats=("fp16", "bf16"), otherwise=otherwise)
    chosen = {dtype: row.choose(NODE, dtype) for dtype in ("fp32", "fp16", "bf16")}
    assert chosen == {"fp32": otherwise, "fp16": row, "bf16": row}


def test_lowering_honours_since_in_an_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two alternatives the first does not fit; the second holds from 1.24 on."""
    ports = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2]) for n in "xy"]
    graph = onnx.helper.make_graph([NODE], "g", ports[:1], ports[1:])
    opsets = [onnx.helper.make_opsetid("", 24)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
    second = replace(ROWS["Gelu"], since=(1, 24), why="second")
    monkeypatch.setitem(ROWS, "Gelu", replace(ROWS["Gelu"], fits=never, otherwise=second))
    for target in (NEW, ANY):
        assert [d.why for d in decide("c", model, target)] == ["second"]
    with pytest.raises(UnsupportedError, match="c uses ops that .* Gelu"):
        decide("c", model, OLD)
    with pytest.raises(UnsupportedError, match="Gelu"):
        lower(model, OLD)


@pytest.mark.parametrize(("target", "opset"), [(OLD, 23), (NEW, 24), (ANY, 24)])
def test_the_opset_is_that_of_the_release(target: Target, opset: int) -> None:
    assert capabilities.of(target).opset == opset
    assert ("TensorScatter" in capabilities.of(target).rows()) == (opset == 24)


def test_what_targets_compute_in() -> None:
    for name in ("cpu", "reference"):
        can = capabilities.of(parse(name))
        assert {can.computes_in(dtype) for dtype in ("fp32", "fp16", "bf16")} == {"fp32"}
        assert can.cache_in("fp16") == "fp32"
    device = capabilities.of(parse("jetson-agx-orin"))
    assert [device.computes_in(d) for d in ("fp32", "fp16", "bf16")] == ["fp32", "fp16", "bf16"]
    assert device.cache_in("bf16") == "bf16"
    assert capabilities.of(parse("reference")).rows() == {}
    card = capabilities.of(Target("onnxruntime-cuda", (), "sm_89"))
    assert [card.cache_in(d) for d in ("fp32", "fp16", "bf16")] == ["fp32", "fp16", "bf16"]
    assert card.opset == 23
