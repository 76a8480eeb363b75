"""Our own kernels against what they stand for, in every form that this processor has."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from edgevlm.engines.backends import sessions
from edgevlm.engines.lowering import native as calls
from edgevlm.engines.native import library
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.quantization.channels import round_rows

# batch, queries, keys, heads, channels of a head: one token, parts of vectors and of blocks of six
# rows, keys of other numbers than queries, one head, channels that are no multiple of 16
SHAPES = [
    (1, 1, 1, 1, 32),
    (2, 7, 7, 3, 64),
    (1, 33, 33, 2, 72),
    (1, 50, 17, 1, 128),
    (3, 6, 65, 2, 104),
    (1, 130, 577, 2, 64),
    (1, 5, 1100, 1, 20),
]
WITHIN = {
    "plain": 2e-6,
    "avx2": 0.01,
    "avx-vnni": 0.01,
    "avx512-vnni": 0.03,
    "avx512-bf16": 0.02,
    "dotprod": 0.04,
}


@pytest.fixture(scope="module")
def path() -> str:
    found = library.native()
    if found.path is None:
        pytest.skip(f"there are no kernels of ours here: {found.why}")
    return str(found.path)


def forms() -> list[str]:
    return library.forms_here(library.native()) or ["plain"]


@pytest.fixture(params=forms())
def form(path: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Every form in turn, in use meanwhile."""
    assert loaded(path).edgevlm_use_form(library.FORMS.index(request.param)) == 0
    yield request.param
    loaded(path).edgevlm_use_form(-1)
    library.native()


def tensors(shape: tuple[int, ...], kind: str) -> tuple[Array, Array, Array]:
    """Random q, k, v; kind: channels with offsets and loud ones, or keys that take all weight."""
    batch, queries, keys, heads, size = shape
    random = np.random.default_rng(7)
    q, k, v = (
        random.standard_normal((batch, rows, heads * size), np.float32)
        for rows in (queries, keys, keys)
    )
    if kind in ("offsets", "sinks"):
        q += random.standard_normal(heads * size, np.float32)
        k += 4 * random.standard_normal(heads * size, np.float32)
        v += random.standard_normal(heads * size, np.float32)
        k[..., ::16] *= 3
    if kind == "tiny":
        q, k, v = (1e-20 * x for x in (q, k, v))
    if kind == "sinks":
        k[:, ::40] *= 3
        v[:, ::40] *= 0.05
    return q, k, v


def exact(q: Array, k: Array, v: Array, heads: int) -> Array:
    wide = (x.astype(np.float64) for x in (q, k, v))
    apart = [x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in wide]
    scores = apart[0] @ apart[1].swapaxes(2, 3) / np.sqrt(apart[0].shape[3])
    with np.errstate(invalid="ignore", over="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ apart[2]
    return np.asarray(mixed.transpose(0, 2, 1, 3).reshape(q.shape))


@cache
def loaded(path: str) -> Any:
    found = ctypes.CDLL(path)
    pointer = np.ctypeslib.ndpointer(np.float32, flags="C")
    sizes = np.ctypeslib.ndpointer(np.uintp, flags="C")
    found.edgevlm_attend.argtypes = [*[pointer] * 4, sizes, ctypes.c_int]
    return found


def attend(path: str, form: str, q: Array, k: Array, v: Array, heads: int) -> Array:
    y = np.full_like(q, 7)
    sizes = np.asarray((*q.shape[:2], k.shape[1], heads, q.shape[2] // heads), np.uintp)
    assert loaded(path).edgevlm_attend(q, k, v, y, sizes, library.FORMS.index(form)) == 0
    return y


@pytest.mark.parametrize("kind", ["random", "offsets", "sinks", "tiny"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_attention(path: str, shape: tuple[int, ...], kind: str, form: str) -> None:
    q, k, v = tensors(shape, kind)
    found, wanted = attend(path, form, q, k, v, shape[3]), exact(q, k, v, shape[3])
    error = np.sqrt(np.square(found - wanted).sum() / np.square(wanted).sum())
    assert error < WITHIN[form]


def test_attention_of_equal_values_is_that_value(path: str, form: str) -> None:
    """Weights sum to one, and values without a spread have no step to round by."""
    q, k, _ = tensors((1, 9, 40, 2, 32), "random")
    v = np.full_like(k, 3.5)
    np.testing.assert_allclose(attend(path, form, q, k, v, 2), 3.5, rtol=1e-2)
    zeros = np.zeros_like(k)
    np.testing.assert_allclose(attend(path, form, q[:, :9] * 0, zeros, v, 2), 3.5, rtol=1e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_no_number_comes_out_where_it_does_of_floats(
    path: str, where: str, bad: float, form: str
) -> None:
    given = dict(zip("qkv", tensors((1, 20, 20, 2, 32), "random"), strict=True))
    given[where][0, 4, 3] = bad
    q, k, v = (given[name] for name in "qkv")
    wanted, found = exact(q, k, v, 2), attend(path, form, q, k, v, 2)
    finite = np.isfinite(wanted)
    assert (np.isnan(found) == np.isnan(wanted)).all()
    assert np.isfinite(found[:, 5:, 32:]).all()  # the other head
    np.testing.assert_allclose(
        found[:, :4][finite[:, :4]], wanted[:, :4][finite[:, :4]], 1e-5, 0.05
    )


def test_an_image_does_not_depend_on_those_beside_it(path: str, form: str) -> None:
    q, k, v = tensors((3, 30, 30, 2, 64), "offsets")
    q[0], k[0], v[0] = 50 * q[0], np.nan, 9 * v[0]
    together = attend(path, form, q, k, v, 2)
    for i in (1, 2):
        one, its, own = (np.ascontiguousarray(x[i : i + 1]) for x in (q, k, v))
        alone = attend(path, form, one, its, own, 2)
        assert (together[i] == alone[0]).all()


def session(model: Any, path: str, threads: int) -> Any:
    options = sessions.session_options(threads)
    options.register_custom_ops_library(path)
    return sessions.open_session(model.SerializeToString(), options)


def test_threads_change_no_bit(path: str, form: str) -> None:
    q, k, v = tensors((2, 140, 140, 3, 64), "offsets")
    model = calls.lone_attention(192, 3)
    assert calls.call_attention(model) == 1
    feed = {"q": q, "k": k, "v": v}
    one, two = (session(model, path, threads).run(None, feed)[0] for threads in (1, 3))
    assert (one == two).all()
    assert (one == attend(path, form, q, k, v, 3)).all()


def test_what_does_not_go_together_is_refused(path: str) -> None:
    q, k, v = tensors((1, 4, 5, 3, 64), "random")
    model = calls.lone_attention(192, 3)
    calls.call_attention(model)
    opened = session(model, path, 1)
    with pytest.raises(Exception, match="do not go together"):
        opened.run(None, {"q": q, "k": k, "v": v[:, :4]})


# -- rows ------------------------------------------------------------------------------------

ACTIVATIONS: dict[int, Callable[[Array], Array]] = {
    0: lambda x: x,
    1: NumpyOps().gelu,
    2: lambda x: NumpyOps().gelu(x, tanh=True),
    3: NumpyOps().quick_gelu,
}


def called(
    path: str, op: str, outputs: list[str], *inputs: Array, **attributes: Any
) -> list[Array]:
    """What a kernel makes of its inputs, in a graph of its own, whose shapes are not known."""
    names = [f"in.{i}" for i in range(len(inputs))]
    node = helper.make_node(op, names, outputs, "n", domain=library.DOMAIN, **attributes)
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * value.ndim)
        for name, value in zip(names, inputs, strict=True)
    ]
    kinds = {"codes": TensorProto.UINT8}
    results = [
        helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), [None] * inputs[0].ndim)
        for n in outputs
    ]
    graph = helper.make_graph([node], "rows", ports, results)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(library.DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return list(session(model, path, 2).run(outputs, dict(zip(names, inputs, strict=True))))


def rows(path: str, op: str, *inputs: Array, **attributes: Any) -> tuple[Array, Array]:
    """Codes and steps."""
    codes, steps = called(path, op, ["codes", "steps"], *inputs, **attributes)
    return codes, steps


@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (2, 5, 37), (40, 200), (1, 4, 4, 48)])
def test_rows_are_rounded_as_the_reference_rounds(
    path: str, form: str, shape: tuple[int, ...]
) -> None:
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    x.reshape(-1, shape[-1])[0] = 0
    codes, steps = rows(path, calls.ROUND, x)
    assert codes.dtype == np.uint8 and steps.shape == (*shape[:-1], 1)
    values = (codes.astype(np.float32) - 128) * steps
    np.testing.assert_allclose(values, round_rows(x), atol=1e-5 + 1.01 * float(steps.max()))
    assert (np.abs(values - x) <= 0.5001 * steps + 1e-7).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_the_reference(path: str, form: str, activation: int) -> None:
    random = np.random.default_rng(activation)
    x = np.linspace(-12, 12, 50 * 41, dtype=np.float32).reshape(50, 41)
    x[::7] *= 20
    scales = random.uniform(0.5, 2, (50, 1)).astype(np.float32)
    bias = random.standard_normal(41, np.float32)
    how = {"activation": activation, "alpha": 1.702}
    codes, steps = rows(path, calls.ACTIVATE, x, scales, bias, **how)
    wanted = ACTIVATIONS[activation](x * scales + bias)
    largest = np.abs(wanted).max(-1, keepdims=True)
    np.testing.assert_allclose(127 * steps, largest, rtol=1e-5, atol=1e-6)
    values = (codes.astype(np.float32) - 128) * steps
    assert (np.abs(values - wanted) <= 0.501 * steps + 1e-6).all()


def test_a_row_with_no_number_says_so_in_its_step(path: str, form: str) -> None:
    x = np.ones((4, 20), np.float32)
    x[1, 3], x[2, 4] = np.nan, np.inf
    codes, steps = rows(path, calls.ROUND, x)
    assert np.isfinite(steps[[0, 3]]).all() and not np.isfinite(steps[[1, 2]]).any()
    assert (codes[[0, 3]] == 255).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (2, 5, 37), (40, 200)])
def test_norms_are_those_of_the_reference(path: str, form: str, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    x = 3 * random.standard_normal(shape, np.float32) + 50
    x.reshape(-1, shape[-1])[0] = 7  # of a row of equal values nothing but the bias is left
    weight, bias = random.standard_normal((2, shape[-1]), np.float32)
    codes, steps = rows(path, calls.NORM, x, weight, bias, epsilon=1e-5)
    w = Weights({"n.weight": weight, "n.bias": bias}, ("n",))
    wanted = NumpyOps().layer_norm(x, w, 1e-5)
    values = (codes.astype(np.float32) - 128) * steps
    np.testing.assert_allclose(127 * steps, np.abs(wanted).max(-1, keepdims=True), rtol=1e-4)
    assert (np.abs(values - wanted) <= 0.51 * steps).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (2, 5, 37), (3, 40, 200)])
def test_rows_are_scaled_and_added(path: str, form: str, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(1)
    x, other = random.standard_normal((2, *shape), np.float32)
    scales, bias = random.random((*shape[:-1], 1), np.float32), random.random(shape[-1], np.float32)
    (y,) = called(path, calls.SCALE, ["y"], x, scales, bias)
    np.testing.assert_allclose(y, x * scales + bias, atol=1e-6)
    for others in (other, other[:1]):
        (y,) = called(path, calls.ONTO, ["y"], x, scales, bias, others)
        np.testing.assert_allclose(y, x * scales + bias + others, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 1, 8), (2, 4, 1), (2, 3, 8), (1, 2, 4, 8)])
def test_what_is_no_tensor_of_such_rows_is_not_added(path: str, shape: tuple[int, ...]) -> None:
    x = np.ones((2, 4, 8), np.float32)
    with pytest.raises(Exception, match="do not go together"):
        called(path, calls.ONTO, ["y"], x, x[..., :1], x[0, 0], np.ones(shape, np.float32))
