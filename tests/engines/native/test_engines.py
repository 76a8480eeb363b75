"""Engines with a second graph for our own kernels: built, opened with and without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgevlm import api
from edgevlm.engines import manifest
from edgevlm.engines.backends import RunnerOptions, native, onnxruntime, sessions
from edgevlm.engines.build import check
from edgevlm.engines.build import native as building
from edgevlm.engines.build import native_decoder as of_lm
from edgevlm.engines.build.timings import Timings
from edgevlm.engines.lowering import native as calls
from edgevlm.engines.lowering import native_decoder, native_products
from edgevlm.engines.lowering.lower import lower
from edgevlm.engines.lowering.signed import sign_weights
from edgevlm.engines.native import library
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit import models
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.goldens import relative_rms
from edgevlm.toolkit.bundle.manifest import GOLDENS, Bundle
from edgevlm.toolkit.errors import AccuracyError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.plan import Precision, PrecisionPlan
from edgevlm.toolkit.target import this_cpu
from edgevlm.toolkit.vlm.components import Component
from tests.conftest import HERE
from tests.engines.build.test_row_quantized import stored
from tests.pipeline import ask, engine_of
from tests.toolkit.models.test_architectures import component, feed, tensors

GOLDEN = HERE / "goldens/e2e_llava15"
ROWS = PrecisionPlan("int8_rows")
FORM = library.native().form
MULTIPLIES = FORM in library.AVX512  # others have kernels for attention and rows alone
PRODUCTS = (native.PRODUCTS,) if MULTIPLIES else ()
VISION = (native.ATTENTION, native.ROWS, *PRODUCTS)
CACHED = (native.CACHED,) if FORM == library.BF16 else ()
OURS = {calls.ATTENTION, calls.ROUND, calls.NORM} | (
    {native_products.PRODUCT, native_products.PRODUCT_ONTO, native_products.ACTIVATED}
    if MULTIPLIES
    else {calls.ACTIVATE, calls.SCALE, calls.ONTO}
)
pytestmark = pytest.mark.skipif(
    library.native().path is None, reason="there are no kernels of ours here"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("native")
    engine_of(GOLDEN / "llava-v1.5-tiny", work)
    return work / "bundle"


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Path:
    out = bundle.parent / "rows"
    api.build_engine(bundle, out, precision="int8-rows", tune=False)
    return out


def encoded(engine: Path, bundle: Path) -> tuple[Array, set[str]]:
    """The features of a golden call of the encoder, and the ops that made them."""
    described = manifest.read(engine)
    record = next(c for c in described.components if c.name == "encoder.clip")
    options = RunnerOptions(1, 1, profile=True, plugins=described.plugins)
    runner = onnxruntime.open(engine, record, {}, options)
    calls = goldens.calls_of(
        goldens.load(bundle / GOLDENS), record.name, record.inputs, record.outputs
    )
    (features,) = (value.copy() for value in runner.run(calls[0].inputs).values())
    return features, {layer.op for layer in runner.layers()}


def test_an_engine_has_both_graphs_and_says_so(engine: Path) -> None:
    described = manifest.read(engine)
    assert described.plugins == (*VISION, *CACHED)
    assert described.options.plugins == () and "--plugins" not in described.rebuild_command(engine)
    graphs = {name for name in described.files if name.endswith(".native.onnx")}
    assert graphs == {f"{name}.native.onnx" for name in ("encoder.clip", "merger", "lm")}
    assert not [f for f in engine.iterdir() if f.suffix == ".so"]
    lines = {(d.component, d.op, d.into, d.count) for d in described.lowering}
    assert ("encoder.clip", "edgevlm.Attention", "edgevlm.native.RoundedAttention", 3) in lines
    assert ("merger", "edgevlm.RowQuantize", "edgevlm.native.RoundRows", 3) in lines
    products = ("edgevlm.RowQuantizedLinear", "edgevlm.native.RoundedProduct")
    # of two layers q, k, v, out and down; gate and up are one; and the output layer
    assert (("lm", *products, 13) in lines) == MULTIPLIES
    if CACHED:
        attention = ("edgevlm.CachedAttention", "edgevlm.native.CachedAttention")
        assert ("lm", *attention, 2) in lines


def test_it_answers_the_same_without_the_library(
    engine: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, made = encoded(engine, bundle)
    assert made >= OURS
    tokens = 3  # of the fourth three logits are within 0.05, and processors choose differently
    answer = ask(engine, "<image>\nWhat?", [GOLDEN / "image.png"], tokens).token_ids
    monkeypatch.setenv(library.SWITCH, "0")
    plain, made = encoded(engine, bundle)
    assert "MultiHeadAttention" in made and not made & OURS
    assert 0 < relative_rms([(ours, plain)]) < 0.03
    assert ask(engine, "<image>\nWhat?", [GOLDEN / "image.png"], tokens).token_ids == answer


def test_a_graph_that_the_description_does_not_name_is_not_run(engine: Path, bundle: Path) -> None:
    described = manifest.read(engine)
    record = next(c for c in described.components if c.name == "encoder.clip")
    runner = onnxruntime.open(engine, record, {}, RunnerOptions(1, 1, profile=True))
    size = described.parsed_vlm().encoders[0].config.pixels
    runner.run({record.inputs[0].name: np.zeros((1, 3, *size), np.float32)})
    assert "RoundedAttention" not in {layer.op for layer in runner.layers()}


def test_a_library_that_is_refused_is_done_without(
    engine: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.so").write_bytes(b"no library")
    odd = library.Native(tmp_path / "odd.so", form="avx2")
    monkeypatch.setattr(native, "native", lambda: odd)
    _, made = encoded(engine, bundle)
    assert "MultiHeadAttention" in made


def test_a_build_that_is_not_to_have_them_has_one_graph(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    built = api.build_engine(bundle, tmp_path / "plain", precision="int8-rows", tune=False)
    assert built.plugins == () and not any("native" in name for name in built.files)


def test_kernels_beyond_the_limit_are_left_out(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = check.check

    def strict(source: Any, parts: list[Any], *rest: Any, **more: Any) -> Any:
        if any(part.plugins for part in parts):
            raise AccuracyError("encoder.clip differs from the reference")
        return checked(source, parts, *rest, **more)

    monkeypatch.setattr(check, "check", strict)
    said: list[str] = []
    built = api.build_engine(
        bundle, tmp_path / "strict", precision="int8-rows", tune=False, progress=said.append
    )
    assert built.plugins == () and not any("native" in name for name in built.files)
    assert not any("native" in d.into for d in built.lowering)
    assert "without our own kernels: encoder.clip differs from the reference" in said
    assert manifest.faults(tmp_path / "strict", built) == []
    Session.open(tmp_path / "strict").close()


@pytest.mark.skipif(not CACHED, reason="this processor has no bfloat16")
def test_attention_of_many_tokens_is_compared_too(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goldens are of few tokens, which it computes in float32."""
    monkeypatch.setattr(of_lm, "tolerance", lambda component: 0.0)
    said: list[str] = []
    built = api.build_engine(
        bundle, tmp_path / "e", precision="int8-rows", tune=False, progress=said.append
    )
    assert built.plugins == () and any("attention of many tokens" in line for line in said)


class Prescribed(Timings):
    """Times by op and precision alone. ours: of attention without a cache."""

    def __init__(self, ours: float, cached: float = 0.5, products: float = 0.5) -> None:
        self.ours = {"attention": ours, "cached": cached, "product": products}
        self.asked = list[str]()

    def of_op(
        self,
        op: str,
        precisions: Sequence[Precision],
        measure: Callable[[], dict[Precision, float]],
    ) -> dict[Precision, float]:
        self.asked.append(op)
        assert set(measured := measure()) == set(precisions) and min(measured.values()) > 0
        return {p: 1.0 if p == "float" else self.ours[op.split()[0]] for p in precisions}

    def save(self) -> None:
        """Nothing was measured."""


@pytest.mark.parametrize(("ours", "taken"), [(0.5, True), (0.99, False), (2.0, False)])
def test_attention_runs_in_the_kernel_that_is_faster(
    bundle: Path, ours: float, taken: bool
) -> None:
    timings = Prescribed(ours)
    found, trials = building.chosen(Bundle.open(bundle).model, ROWS, timings)
    assert found["encoder.clip"] == (VISION if taken else VISION[1:])
    assert found["merger"] == VISION[1:] and found["lm"] == (*CACHED, *VISION[1:])
    timed = [t for t in trials if (t.component, t.call) == ("encoder.clip", "attention")]
    assert [(t.precision, t.ms, t.chosen) for t in timed] == [
        ("float", 3.0, not taken),
        ("int8_rows", round(3 * ours, 3), taken),
    ]
    assert sum("Attention(queries=" in op for op in timings.asked) == 1


@pytest.mark.parametrize("slow", ["cached", "products"])
def test_so_do_cached_attention_and_products(bundle: Path, slow: str) -> None:
    timings = Prescribed(0.5, **{slow: 1.0})
    found, trials = building.chosen(Bundle.open(bundle).model, ROWS, timings)
    kept = CACHED if slow == "products" else ()
    products = () if slow == "products" else PRODUCTS
    assert found["lm"] == (*kept, native.ROWS, *products)
    call = "attention" if slow == "cached" else "products"
    timed = {t.precision: t.chosen for t in trials if (t.component, t.call) == ("lm", call)}
    judged = CACHED if slow == "cached" else PRODUCTS
    assert timed == ({"float": True, "int8_rows": False} if judged else {})


def test_each_form_of_a_language_model_is_judged_by_its_calls(bundle: Path) -> None:
    model, timings = Bundle.open(bundle).model, Prescribed(0.5)
    found, _ = building.chosen(model, PrecisionPlan("int4_weights"), timings, ROWS)
    assert found.get("lm", ()) == CACHED
    assert found["lm, prompts"] == (*CACHED, native.ROWS, *PRODUCTS)
    tokens = [op for op in timings.asked if "tokens=1," in op]
    assert len(tokens) == len(CACHED)


@pytest.mark.parametrize("plan", ["float", "int8_weights"])
def test_what_does_not_round_its_inputs_keeps_its_kernels(bundle: Path, plan: Precision) -> None:
    found, trials = building.chosen(Bundle.open(bundle).model, PrecisionPlan(plan), None)
    assert (found, trials) == ({} if plan == "float" or not CACHED else {"lm": CACHED}, ())


def run(model: Any, folder: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """A graph's outputs, in a session that knows our kernels."""
    options = sessions.read_weights_from(sessions.session_options(1), folder)
    options.register_custom_ops_library(str(library.native().path))
    opened = sessions.open_session(model.SerializeToString(), options)
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(names, dict(inputs)), strict=True))


def signed(part: Component, folder: Path) -> onnx.ModelProto:
    """A lowered component as an engine for this processor has it: its weights are signed."""
    model = lower(stored(part, tensors(part), folder), this_cpu())
    names, file = sign_weights(model), folder / "w.safetensors"
    content = bytearray(file.read_bytes())
    for tensor in model.graph.initializer:
        if tensor.name in names:
            where = {item.key: item.value for item in tensor.external_data}
            span = slice(begin := int(where["offset"]), begin + int(where["length"]))
            content[span] = (np.frombuffer(content[span], np.uint8) ^ np.uint8(128)).tobytes()
    file.write_bytes(content)
    return model


EVERY = [(role, kind) for role in ("encoders", "mergers") for kind in models.kinds(role)]


@pytest.mark.parametrize(("role", "kind"), EVERY)
def test_every_architecture_runs_in_our_kernels(role: str, kind: str, tmp_path: Path) -> None:
    """Whatever its shapes: of sizes that are not known, ONNX Runtime is told names of ours."""
    part, given = component(role, kind), feed(component(role, kind))
    lowered = signed(part, tmp_path)
    ours = onnx.ModelProto()
    ours.CopyFrom(lowered)
    # SAM's q and k have more channels than v
    attentions = 0 if kind == "sam" else calls.call_attention(ours)
    assert calls.call_rows(ours) > 0
    if MULTIPLIES:
        assert native_products.call_products(ours) > 0
    plain = sum(node.op_type == "MultiHeadAttention" for node in lowered.graph.node)
    assert attentions == (0 if kind == "sam" else plain)
    found, wanted = run(ours, tmp_path, given), run(lowered, tmp_path, given)
    for name, values in wanted.items():
        limit = 0.05 if attentions else 0.01  # another side of a step for values between two
        assert relative_rms([(found[name], values)]) < limit


@pytest.mark.parametrize("kind", models.kinds("lms"))
def test_every_language_model_runs_in_our_kernels(kind: str, tmp_path: Path) -> None:
    part, given = component("lms", kind), feed(component("lms", kind))
    lowered = signed(part, tmp_path)
    ours = onnx.ModelProto()
    ours.CopyFrom(lowered)
    window = any(
        a.name == "local_window_size" and a.i > 0 for n in lowered.graph.node for a in n.attribute
    )
    if CACHED:
        assert native_decoder.call_cached_attention(ours) == (0 if window else 2)
    assert not MULTIPLIES or native_decoder.call_decoder_rows(ours) > 0
    assert calls.call_rows(ours) > 0
    assert not MULTIPLIES or native_products.call_products(ours) > 0
    left = Counter(node.op_type for node in ours.graph.node)
    assert left["QuantizeLinear"] == 0
    if MULTIPLIES:
        assert left["MatMulIntegerToFloat"] == left["QuickGelu"] == 0
    found, wanted = run(ours, tmp_path, given), run(lowered, tmp_path, given)
    for name, values in wanted.items():
        assert relative_rms([(found[name], values)]) < 0.01


def test_attention_with_relative_positions_is_left_alone() -> None:
    found, rounds = building._calls(component("encoders", "sam"), {"tiles": 1}, ROWS)
    assert not found and rounds
