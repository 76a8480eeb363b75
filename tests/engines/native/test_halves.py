"""Weights in 16 bits: the kernel in every form, the graph around it, and engines that have both."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgevlm import api
from edgevlm.engines import manifest
from edgevlm.engines.backends import native, sessions
from edgevlm.engines.build import halves
from edgevlm.engines.build.timings import Timings
from edgevlm.engines.lowering import halves as calls
from edgevlm.engines.native import library
from edgevlm.engines.runtime.session import Session
from edgevlm.engines.serving.rows import rows_together
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.safetensors_io import (
    SafetensorsFile,
    TensorSpec,
    from_bfloat16,
    write_safetensors,
)
from edgevlm.toolkit.ops.vocabulary import Array
from tests.conftest import HERE
from tests.pipeline import ask

GOLDEN = HERE / "goldens/e2e_llava15"
PLAIN, AVX2, AVX512 = 0, 1, 2  # of halves.h
SUM, PRODUCT = 1, 2
# rows, inputs, outputs: one row and few, many; rests of vectors, of panels and of blocks
SHAPES = [(1, 37, 33), (3, 40, 100), (8, 64, 512), (9, 300, 70), (25, 513, 450), (61, 600, 900)]
pytestmark = pytest.mark.skipif(
    library.native().path is None, reason="there are no kernels of ours here"
)


@dataclass(frozen=True)
class Call:
    """A product and what is joined with it."""

    x: Array
    w: Array
    kind: str
    transposed: bool = False
    bias: Array | None = None
    other: Array | None = None
    joined: int = 0
    alpha: float = 0.0

    def __call__(self, form: int) -> Array:
        """In one form, or in the best that is here."""
        loaded = ctypes.CDLL(str(library.native().path))
        rows, inputs = self.x.shape
        y = np.empty((rows, self.w.shape[0 if self.transposed else 1]), np.float32)
        others = 0 if self.other is None else len(self.other)
        form_of = ("fp16", "bf16").index(self.kind)
        sizes = (rows, inputs, y.shape[1], others, form_of, self.joined, self.transposed)
        arrays = (self.x, self.w, self.bias, self.other, y)
        pointers = [ctypes.c_void_p(None if a is None else a.ctypes.data) for a in arrays]
        best = loaded.edgevlm_upcast(
            *pointers, (ctypes.c_size_t * 7)(*sizes), ctypes.c_float(self.alpha), form
        )
        assert form <= best
        return y

    def wanted(self) -> Array:
        """In float64."""
        w = upcast(self.w, self.kind).astype(np.float64)
        y = self.x.astype(np.float64) @ (w.T if self.transposed else w)
        y = y if self.bias is None else y + self.bias
        if self.alpha:
            y = y / (1 + np.exp(-self.alpha * y))
        if self.other is not None:
            other = np.resize(self.other, y.shape)
            y = y + other if self.joined == SUM else y * other
        return np.asarray(y)


def upcast(bits: Array, kind: str) -> Array:
    return bits.view(np.float16).astype(np.float32) if kind == "fp16" else from_bfloat16(bits)


def narrowed(values: Array, kind: str) -> Array:
    """Bits of values in 16 bits; not rounded in bf16."""
    if kind == "fp16":
        return values.astype(np.float16).view(np.uint16)
    return np.asarray(values.view(np.uint32) >> 16, np.uint16)


def random_calls(shape: tuple[int, int, int], kind: str, transposed: bool) -> list[Call]:
    rows, inputs, outputs = shape
    random = np.random.default_rng(3)
    x, w = (random.standard_normal(s, np.float32) for s in ((rows, inputs), (inputs, outputs)))
    w = narrowed(np.ascontiguousarray(w.T if transposed else w) / 16, kind)
    bias = random.standard_normal(outputs, np.float32)
    other = random.standard_normal((rows, outputs), np.float32)
    return [
        Call(x, w, kind, transposed),
        Call(x, w, kind, transposed, bias, other, SUM),
        Call(x, w, kind, transposed, None, other, PRODUCT, alpha=1.0),
        Call(x, w, kind, transposed, bias, alpha=1.702),
    ]


def forms() -> list[int]:
    here = library.native().form
    return [PLAIN, *[AVX2] * (here in halves._VECTORS), *[AVX512] * (here in library.AVX512)]


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_multiplies_by_the_values_that_are_stored(
    shape: tuple[int, int, int], transposed: bool, kind: str
) -> None:
    for call in random_calls(shape, kind, transposed):
        wanted = call.wanted()
        found = [call(form) for form in forms()]
        for y in found:
            assert np.abs(y - wanted).max() < 2e-6 * np.abs(wanted).max()
        if not transposed and not call.alpha:  # one chain of sums in all forms
            assert all(np.array_equal(y, found[0]) for y in found)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_bits_of_a_row_depend_on_no_other_row(transposed: bool, kind: str) -> None:
    """Alone, beside a few and beside many."""
    for call in random_calls((30, 530, 300), kind, transposed):
        for form in forms()[1:]:
            whole = call(form)
            for rows in (slice(0, 1), slice(7, 9), slice(3, 11), slice(2, 25)):
                other = None if call.other is None else call.other[rows].copy()
                few = Call(
                    *(call.x[rows].copy(), call.w, kind, transposed, call.bias),
                    *(other, call.joined, call.alpha),
                )
                assert np.array_equal(few(form), whole[rows])


def test_all_values_of_16_bits_are_read_as_what_they_are() -> None:
    """Infinities and what is below the smallest normal number too; of NaN that it is one."""
    every = np.arange(1 << 16, dtype=np.uint16).reshape(1, -1)
    one = np.ones((1, 1), np.float32)
    for kind in ("fp16", "bf16"):
        wanted = upcast(every, kind)
        for form in forms():
            for rows in (1, 9):
                found = Call(np.repeat(one, rows, 0), every, kind)(form)
                assert all(np.array_equal(y, wanted[0], equal_nan=True) for y in found)


def test_what_is_joined_may_come_again() -> None:
    (call, *_) = random_calls((12, 64, 96), "fp16", False)
    other = np.random.default_rng(1).standard_normal((4, 96), np.float32)
    again = Call(call.x, call.w, "fp16", other=other, joined=SUM)
    assert np.abs(again(AVX2) - again.wanted()).max() < 1e-5


# -- graphs ----------------------------------------------------------------------------------


def test_16_bits_are_found_by_every_bit() -> None:
    values = np.random.default_rng(0).standard_normal((64, 32), np.float32)
    assert halves.format_of(values) is None
    for kind in ("fp16", "bf16"):
        exact = upcast(narrowed(values, kind), kind)
        assert halves.format_of(exact) == kind
        exact[63, 31] = np.nextafter(exact[63, 31], np.float32(9))
        assert halves.format_of(exact) is None
    assert halves.format_of(np.full((2, 2), 1e9, np.float32)) is None
    assert halves.format_of(np.array([[np.inf, -0.0]], np.float32)) == "bf16"


def a_layer(kind: str, folder: Path) -> onnx.ModelProto:
    """gate * up, down and a residual, with a table and its product transposed."""
    random = np.random.default_rng(2)
    shapes = {"table": (64, 32), "gate": (32, 48), "up": (32, 48), "down": (48, 32)}
    tensors = []
    for name, shape in shapes.items():
        values = upcast(narrowed(random.standard_normal(shape, np.float32), kind), kind)
        tensors.append(onnx.numpy_helper.from_array(values, name))
    bias = onnx.numpy_helper.from_array(random.standard_normal(48, np.float32), "bias")
    micro = "com.microsoft"
    node, transposed = helper.make_node, cast(dict[str, Any], calls._TRANSPOSED)
    nodes = [
        node("Gather", ["table", "ids"], ["x"], "embed", axis=0),
        node("MatMul", ["x", "gate"], ["g"], "g"),
        node("Add", ["g", "bias"], ["gb"], "gb"),
        node("QuickGelu", ["gb"], ["s"], "s", domain=micro, alpha=1.0),
        node("MatMul", ["x", "up"], ["u"], "u"),
        node("Mul", ["s", "u"], ["m"], "m"),
        node("MatMul", ["m", "down"], ["d"], "d"),
        node("Add", ["x", "d"], ["r"], "r"),
        node("FusedMatMul", ["r", "table"], ["y"], "y", domain=micro, **transposed),
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "n", 64])],
        [*tensors, bias],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(micro, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save_model(
        model, folder / "x.onnx", save_as_external_data=True, location="x.bin", size_threshold=1024
    )
    return onnx.load(folder / "x.onnx", load_external_data=False)


def outputs(model: onnx.ModelProto, ids: Array, *, ours: bool) -> Array:
    options = sessions.session_options(1)
    if ours:
        options.register_custom_ops_library(str(library.native().path))
    session = sessions.open_session(model.SerializeToString(), options)
    return np.asarray(session.run(None, {"ids": ids})[0])


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_a_graph_gives_the_same_in_16_bits(kind: str, tmp_path: Path) -> None:
    model = a_layer(kind, tmp_path)
    names = calls.candidates(model)
    assert set(names) == {"table", "gate", "up", "down"}
    onnx.external_data_helper.load_external_data_for_model(model, str(tmp_path))
    ids = np.arange(24).reshape(2, 12)
    wanted = outputs(model, ids, ours=False)
    for tensor in model.graph.initializer:
        if tensor.name in names:
            bits = narrowed(onnx.numpy_helper.to_array(tensor), kind)
            tensor.raw_data = bits.tobytes()
    calls.narrow(model, dict.fromkeys(names, kind))
    limit = 2e-6 * np.abs(wanted).max()
    assert np.abs(outputs(model, ids, ours=False) - wanted).max() < limit
    assert calls.call_upcast(model) == 4
    left = [node.op_type for node in model.graph.node]
    assert sorted(left) == sorted(["Gather", "Cast", *[calls.UPCAST] * 4])
    assert np.abs(outputs(model, ids, ours=True) - wanted).max() < limit


def test_a_table_that_something_else_reads_stays(tmp_path: Path) -> None:
    model = a_layer("fp16", tmp_path)
    model.graph.node.append(helper.make_node("ReduceMax", ["table"], ["largest"], "largest"))
    assert set(calls.candidates(model)) == {"gate", "up", "down"}


# -- engines ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, of a checkpoint in fp16, as exports are unless told otherwise."""
    work = tmp_path_factory.mktemp("halves")
    api.export_bundle(str(GOLDEN / "llava-v1.5-tiny"), work / "bundle")
    return work / "bundle"


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "_LEAST_BYTES", 0)


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halves, "_LEAST_BYTES", 0)
        api.build_engine(bundle, bundle.parent / "engine", tune=False)
    return bundle.parent / "engine"


def test_an_engine_keeps_16_bits_and_says_so(engine: Path, bundle: Path) -> None:
    described = manifest.read(engine)
    assert described.plugins == (native.UPCAST,) and described.dtype == "fp32"
    assert {name for name in described.files if name.endswith(".native.onnx")} == {
        f"{name}.native.onnx" for name in ("encoder.clip", "merger", "lm")
    }
    assert manifest.faults(engine, described) == []
    for record in described.components:
        given = SafetensorsFile(bundle / record.weights)
        kept = SafetensorsFile(engine / record.weights)
        for name, entry in kept.entries.items():
            matrix = len(entry.shape) == 2 and name.endswith("weight")
            assert entry.dtype == ("fp16" if matrix else "fp32"), name
            assert np.array_equal(kept.read(name).astype(np.float32), given.read(name))
    lines = {(d.component, d.op, d.into, d.count) for d in described.lowering}
    assert ("merger", "MatMul", "edgevlm.native.UpcastMatMul", 2) in lines


def test_it_answers_the_same_with_and_without_the_library(
    engine: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "<image>\nWhat?", [GOLDEN / "image.png"], 12
    ours = ask(engine, *question).token_ids
    monkeypatch.setenv(library.SWITCH, "0")
    assert ask(engine, *question).token_ids == ours
    plain = api.build_engine(bundle, bundle.parent / "plain", tune=False)
    assert plain.plugins == () and len(plain.files) < len(manifest.read(engine).files)
    assert ask(bundle.parent / "plain", *question).token_ids == ours


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_bundle_in_16_bits_is_not_made_larger(dtype: str, engine: Path, tmp_path: Path) -> None:
    api.export_bundle(str(GOLDEN / "llava-v1.5-tiny"), tmp_path / dtype, dtype=dtype)
    built = api.build_engine(tmp_path / dtype, tmp_path / "engine", tune=False)
    assert built.plugins == (native.UPCAST,) and built.dtype == dtype
    question = "<image>\nWhat?", [GOLDEN / "image.png"], 12
    if dtype == "fp16":
        assert ask(tmp_path / "engine", *question).token_ids == ask(engine, *question).token_ids
    weights = (tmp_path / "engine" / "lm.safetensors").stat().st_size
    assert weights < 1.1 * (tmp_path / dtype / "lm.safetensors").stat().st_size


def test_rows_are_independent_in_batches_of_any_size(engine: Path) -> None:
    with Session.open(engine) as session:
        multiple, state = rows_together(session, 8, strict=False)
        assert multiple == 1 and state.count == 8


def _blocks_of(given: dict[str, Array], spec: TensorSpec) -> list[Array]:
    return [given[spec.name]]


def test_weights_that_are_true_float32_stay(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    exact = values.astype(np.float16).astype(np.float32)
    for first, kind in ((values, None), (exact, "fp16")):
        given = {"first": first, "second": exact[:8]}
        specs = [TensorSpec(name, "fp32", array.shape) for name, array in given.items()]
        write_safetensors(tmp_path / "x", specs, partial(_blocks_of, given))
        assert halves._common_format(SafetensorsFile(tmp_path / "x")) == kind


class Prescribed(Timings):
    """Times by form alone."""

    def __init__(self, ours: float) -> None:
        self.ours, self.asked = ours, list[str]()

    def of_op(self, op: str, precisions: object, measure: object) -> dict[object, float]:  # type: ignore[override]
        self.asked.append(op)
        return {"float": self.ours if ".so" in op else 1.0}

    def save(self) -> None:
        """Nothing was measured."""


@pytest.mark.parametrize(("ours", "taken"), [(0.5, True), (1.0, True), (1.1, False)])
def test_a_component_stays_in_16_bits_where_that_is_no_slower(
    bundle: Path, ours: float, taken: bool
) -> None:
    found, trials = halves.chosen(Bundle.open(bundle), Prescribed(ours), lambda message: None)
    names = ("encoder.clip", "merger", "lm")
    assert found == (dict.fromkeys(names, (native.UPCAST,)) if taken else {})
    lm = [(t.call, t.chosen) for t in trials if t.component == "lm"]
    assert lm == [
        ("prompt", not taken),
        ("prompt, weights in fp16", taken),
        ("token", not taken),
        ("token, weights in fp16", taken),
    ]


def test_both_forms_of_a_product_are_timed() -> None:
    product = halves.Product(2, 64, 96, transposed=False)
    assert all(ms > 0 for ms in halves._measured(product, "bf16"))


def test_small_components_are_left_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert halves.chosen(Bundle.open(bundle), None, lambda message: None) == ({}, ())
