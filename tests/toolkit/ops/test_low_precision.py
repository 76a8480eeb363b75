"""Every op in fp16 and bf16: the reference, torch, and the tables of recorded graphs.

Inputs and parameters are rounded to the low precision first, so that what differs is arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import pytest
import torch
from onnx import TensorProto
from onnx.utils import Extractor

from edgevlm.engines.backends import sessions
from edgevlm.export.write import record
from edgevlm.toolkit.checkpoints.safetensors_io import Written, from_bfloat16, to_bfloat16
from edgevlm.toolkit.models.lms import llama
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Step, Weights
from edgevlm.toolkit.vlm.components import Component, Port
from edgevlm.training.torch_ops import TorchOps
from tests.ops_cases import CASES, Case
from tests.toolkit.models.test_architectures import component

NAMES = sorted(CASES)
DTYPES = ("fp16", "bf16")
# Rounding to 8 bits turns any difference to steps.
EXACT = ("fake_quant", "fake_quant per channel", "fake_quant to fp8")


def rounded(x: Array, dtype: str) -> Array:
    """Float32 values that the low precision holds exactly."""
    if x.dtype.kind != "f":
        return x
    if dtype == "fp16":
        return x.astype(np.float16).astype(np.float32)
    return from_bfloat16(to_bfloat16(x))


def reference(case: Case, weights: dict[str, Array], feed: dict[str, Array]) -> dict[str, Array]:
    return case.component().forward(NumpyOps(), Weights(weights), feed)


def largest_difference(found: Array, expected: Array) -> float:
    """Relative to the largest value, or absolute where all are below 1."""
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1.0))


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_computes_in_float32_whatever_its_weights_are_stored_in(name: str) -> None:
    case = CASES[name]
    weights = {k: rounded(v, "fp16") for k, v in case.weights().items()}
    feed = {k: rounded(v, "fp16") for k, v in case.feed().items()}
    expected = reference(case, weights, feed)
    found = reference(case, {k: v.astype(np.float16) for k, v in weights.items()}, feed)
    for port, array in expected.items():
        assert found[port].dtype == array.dtype, port
        assert largest_difference(found[port], array) < 1e-6, port


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 4e-3), ("bf16", 4e-2)])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in EXACT])
def test_rounding_weights_and_inputs_changes_the_reference_by_little(
    name: str, dtype: str, tolerance: float
) -> None:
    """2^-11 and 2^-8 per value; a sum of a few dozen of them stays within eight times that."""
    case = CASES[name]
    weights = {k: rounded(v, dtype) for k, v in case.weights().items()}
    feed = {k: rounded(v, dtype) for k, v in case.feed().items()}
    for port, array in reference(case, weights, feed).items():
        assert largest_difference(array, case.outputs()[port]) < tolerance, port


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 3e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in EXACT])
def test_torch(name: str, dtype: str, tolerance: float) -> None:
    case = CASES[name]
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    weights = {k: rounded(v, dtype) for k, v in case.weights().items()}
    feed = {k: rounded(v, dtype) for k, v in case.feed().items()}
    expected = reference(case, weights, feed)
    low = {k: torch.from_numpy(v).to(kind) for k, v in weights.items()}
    given = {
        k: torch.from_numpy(v).to(kind) if v.dtype.kind == "f" else torch.from_numpy(v)
        for k, v in feed.items()
    }
    found = case.component().forward(TorchOps(), Weights(low), given)
    for port, array in expected.items():
        assert found[port].is_floating_point() == (array.dtype.kind == "f"), port
        assert found[port].dtype in (kind, torch.int64, torch.bool), port
        assert largest_difference(found[port].float().numpy(), array) < tolerance, port


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "name"), [("lms", "llama"), ("encoders", "mlcd")])
def test_recorded_tables_stay_float32(kind: str, name: str, dtype: str) -> None:
    part = component(kind, name)
    recorded = record(part, dtype)
    tables = set(recorded.ops.constants)
    assert tables
    assert {t.dtype for t in recorded.planned() if t.name in tables} == {"fp32"}
    casts = [n for n in recorded.ops.nodes if n.op_type == "Cast" and tables & set(n.input)]
    assert casts == []
    assert any(tables & set(n.input) for n in recorded.ops.nodes)


POSITION = 30000
# Frequencies 256^(-k / 8) = 2^-k: every angle is exact in float32, so the truth needs no rounding.
CONFIG = replace(llama.tiny(), context=32768, head_dim=16, theta=256.0)


def rotation() -> Component:
    """One layer's attention over a cache, with the tables of a model with a long context."""
    c = CONFIG
    cos, sin = llama.rotary_tables(c)

    def forward(op: Ops[Any], w: Weights[Any], x: Any) -> dict[str, Any]:
        positions = op.positions(x["ids"], x["start"])
        mask = op.causal_mask(positions, x["past_k"], None)
        step = Step(positions, mask, op.constant("cos", cos), op.constant("sin", sin))
        y, _, _ = op.attention_cached(
            x["q"],
            x["k"],
            x["v"],
            (x["past_k"], x["past_v"]),
            step,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            window=None,
        )
        return {"y": y}

    cache = ("batch", c.num_kv_heads, "context", c.head_dim)
    heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
    ports = [Port(x, "float", ("batch", 1, n * c.head_dim)) for x, n in heads.items()]
    ports += [Port(n, "float", cache) for n in ("past_k", "past_v")]
    ports += [Port("ids", "int64", ("batch", 1)), Port("start", "int64", ("batch",))]
    y = Port("y", "float", ("batch", 1, c.num_heads * c.head_dim))
    return Component("lm", forward, {}, tuple(ports), (y,))


def rotating_graph(dtype: str) -> tuple[onnx.ModelProto, str]:
    """The portable graph of `rotation` with its bodies inlined, and where it holds rotated q."""
    recorded = record(rotation(), dtype)
    model = recorded.model("none", Written({}, "", 0))
    tables = recorded.ops.constants.items()
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in tables)
    model = onnx.inliner.inline_local_functions(model)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    first = next(n for n in model.graph.node if n.op_type == "RotaryEmbedding")
    return model, first.output[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_graphs_rotate_in_float32(dtype: str) -> None:
    model, rotated = rotating_graph(dtype)
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    assert kinds[rotated] == TensorProto.FLOAT
    assert {v.name: v.type.tensor_type.elem_type for v in model.graph.input}["q"] == {
        "fp16": TensorProto.FLOAT16,
        "bf16": TensorProto.BFLOAT16,
    }[dtype]


def exactly_rotated(x: Array, heads: int) -> Array:
    """x [1, 1, heads * d] at POSITION, in float64: [1, heads, 1, d]."""
    d = CONFIG.head_dim
    angles = POSITION * 2.0 ** -np.arange(d // 2)
    a, b = np.split(x.astype(np.float64).reshape(1, heads, 1, d), 2, -1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def drawn(heads: int) -> Array:
    """One token's q, k or v, in fp16."""
    shape = (1, 1, heads * CONFIG.head_dim)
    return np.random.default_rng(heads).normal(0, 1, shape).astype(np.float16)


def test_angles_far_into_the_context_are_right_in_an_fp16_graph() -> None:
    q = drawn(CONFIG.num_heads)
    model, rotated = rotating_graph("fp16")
    cut = Extractor(model).extract_model(["q", "ids", "start"], [rotated])
    session = sessions.open_session(cut.SerializeToString())
    feed = {"q": q, "ids": np.zeros((1, 1), np.int64), "start": np.asarray([POSITION])}
    found = session.run(None, feed)[0]
    assert np.abs(found - exactly_rotated(q, CONFIG.num_heads)).max() < 1e-5


def test_torch_rotates_in_float32_and_rounds_once() -> None:
    """The key in the cache is the exact one, rounded to the nearest fp16 value."""
    c = CONFIG
    q, k, v = (torch.from_numpy(drawn(n)) for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads))
    op = TorchOps()
    positions = torch.tensor([[POSITION]])
    past = torch.zeros(1, c.num_kv_heads, c.context, c.head_dim, dtype=torch.float16)
    cos, sin = (op.constant(n, t) for n, t in zip("cs", llama.rotary_tables(c), strict=True))
    step = Step(positions, op.causal_mask(positions, past, None), cos, sin)
    heads: Any = {"num_heads": c.num_heads, "num_kv_heads": c.num_kv_heads}
    _, keys, _ = op.attention_cached(
        q, k, v, (past, past), step, head_dim=c.head_dim, window=None, **heads
    )
    expected = exactly_rotated(k.numpy(), c.num_kv_heads)
    unit = np.spacing(np.abs(expected).astype(np.float16)).astype(np.float64)
    difference = np.abs(keys[:, :, POSITION : POSITION + 1].double().numpy() - expected)
    assert (difference <= 0.5 * unit + 1e-6).all()
