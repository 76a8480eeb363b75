"""Our kernels for language models against what they stand for: attention over a cache, rows, and
products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgevlm.engines.backends import sessions
from edgevlm.engines.lowering import native_decoder, native_products
from edgevlm.engines.native import library
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from tests.engines.native.test_kernels import ACTIVATIONS

FOUND = library.native()
pytestmark = pytest.mark.skipif(
    FOUND.form not in library.AVX512, reason="there are no kernels of ours for AVX-512 here"
)
bfloat16 = pytest.mark.skipif(FOUND.form != library.BF16, reason="this processor has no bfloat16")
FEW = 8  # tokens that are computed in float32, of decoder.h

# batch, new tokens, tokens before, heads, heads of the cache, channels of a head: single tokens,
# parts of blocks of 6 queries, of 16 keys and of vectors, groups of heads, more than one block
FEW_SHAPES = [
    (1, 1, 0, 1, 1, 16),
    (3, 1, 37, 14, 2, 64),
    (2, 7, 16, 4, 2, 80),
    (1, 8, 200, 3, 1, 128),
]
MANY_SHAPES = [
    (1, 9, 0, 2, 1, 16),
    (2, 50, 13, 14, 2, 64),
    (1, 130, 64, 4, 4, 48),
    (1, 61, 90, 3, 1, 128),
]


def session(model: Any, threads: int) -> Any:
    options = sessions.session_options(threads)
    options.register_custom_ops_library(str(FOUND.path))
    return sessions.open_session(model.SerializeToString(), options)


# -- attention over a cache ------------------------------------------------------------------


class Call:
    """Random tensors of one call. starts: tokens before, of each row."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.batch, self.tokens, past, self.heads, self.kv_heads, self.size = shape
        random = np.random.default_rng(seed)
        self.starts = np.asarray([max(past - 5 * row, 0) for row in range(self.batch)])
        context = past + self.tokens + 3
        widths = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        self.feed: dict[str, Array] = {
            name: random.standard_normal((self.batch, self.tokens, heads * self.size), np.float32)
            for name, heads in widths.items()
        }
        cache = (self.batch, self.kv_heads, context, self.size)
        for name in ("key", "value"):
            self.feed[name] = random.standard_normal(cache, np.float32)
        angles = np.outer(np.arange(context), 0.3 ** np.arange(self.size // 2))
        self.feed |= {"cos": np.cos(angles).astype("f"), "sin": np.sin(angles).astype("f")}
        last = self.starts + self.tokens - 1
        self.feed |= {"last": last.astype(np.int32), "total": np.asarray(last.max() + 1, np.int32)}

    def run(self, threads: int = 1) -> list[Array]:
        """y, key and value of our kernel."""
        sizes = self.heads, self.kv_heads, self.size, self.size**-0.5
        model = native_decoder.lone_attention(*sizes)
        assert native_decoder.call_cached_attention(model) == 1
        return list(session(model, threads).run(["y", "new_key", "new_value"], self.feed))

    def rotated(self, name: str, heads: int, row: int) -> Array:
        x = self.feed[name][row].astype(np.float64).reshape(self.tokens, heads, 2, -1)
        span = slice(self.starts[row], self.starts[row] + self.tokens)
        cos, sin = (self.feed[n][span, None].astype(np.float64) for n in ("cos", "sin"))
        low, high = x[:, :, 0], x[:, :, 1]
        turned = [low * cos - high * sin, high * cos + low * sin]
        return np.concatenate(turned, -1)

    def exact(self) -> list[Array]:
        """The same in float64, as it is defined."""
        key, value = (self.feed[name].astype(np.float64) for name in ("key", "value"))
        y = np.zeros((self.batch, self.tokens, self.heads, self.size))
        for row, start in enumerate(self.starts):
            q, end = self.rotated("q", self.heads, row), start + self.tokens
            key[row, :, start:end] = self.rotated("k", self.kv_heads, row).swapaxes(0, 1)
            new = self.feed["v"][row].reshape(self.tokens, self.kv_heads, self.size)
            value[row, :, start:end] = new.swapaxes(0, 1)
            for head in range(self.heads):
                of = head * self.kv_heads // self.heads
                scores = q[:, head] @ key[row, of, :end].T / np.sqrt(self.size)
                scores[np.arange(end) > start + np.arange(self.tokens)[:, None]] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                y[row, :, head] = weights / weights.sum(-1, keepdims=True) @ value[row, of, :end]
        return [y.reshape(self.batch, self.tokens, -1), key, value]


@bfloat16
@pytest.mark.parametrize("shape", [*FEW_SHAPES, *MANY_SHAPES])
def test_attention_over_a_cache_is_that(shape: tuple[int, ...]) -> None:
    call = Call(shape)
    found, wanted = call.run(), call.exact()
    limit = 1e-6 if call.tokens <= FEW else 5e-3
    error = np.sqrt(np.square(found[0] - wanted[0]).sum() / np.square(wanted[0]).sum())
    assert error < limit
    for ours, its in zip(found[1:], wanted[1:], strict=True):  # and nothing else is touched
        np.testing.assert_allclose(ours, its, atol=1e-6)


@bfloat16
@pytest.mark.parametrize("shape", [(2, 5, 20, 6, 2, 32), (2, 70, 20, 6, 2, 32)])
def test_a_token_depends_on_those_before_it_alone(shape: tuple[int, ...]) -> None:
    """To the last bit: however a prompt is divided, whatever follows, and beside whatever."""
    whole, cut, other = Call(shape), Call(shape), Call(shape)
    ends = 3 if whole.tokens <= FEW else 40
    cut.tokens, cut.feed["last"] = ends, whole.feed["last"] - (whole.tokens - ends)
    for name in "qkv":
        cut.feed[name] = np.ascontiguousarray(cut.feed[name][:, :ends])
        other.feed[name][0] = 100
        other.feed[name][1, ends:] *= -7
    together, alone, beside = whole.run(), cut.run(), other.run()
    assert (together[0][:, :ends] == alone[0]).all()
    assert (together[0][1, :ends] == beside[0][1, :ends]).all()
    assert not (together[0][1, ends:] == beside[0][1, ends:]).any()
    assert all((a == b).all() for a, b in zip(together, whole.run(3), strict=True))


@bfloat16
@pytest.mark.parametrize("shape", [(1, 1, 40, 4, 2, 32), (1, 40, 40, 4, 2, 32)])
def test_tokens_guessed_together_are_those_that_come_one_by_one(shape: tuple[int, ...]) -> None:
    call = Call(shape)
    found, first = call.run(), int(call.starts[0])
    rest = Call((1, 6, 40 + call.tokens, 4, 2, 32), 1)
    for name, cache in (("key", found[1]), ("value", found[2])):
        rest.feed[name][:, :, : cache.shape[2]] = cache
    together = rest.run()
    for i in range(rest.tokens):
        one = Call((1, 1, first + call.tokens + i, 4, 2, 32))
        one.feed |= {name: rest.feed[name][:, i : i + 1] for name in "qkv"}
        one.feed |= {"key": together[1].copy(), "value": together[2].copy()}
        one.feed |= {name: rest.feed[name] for name in ("cos", "sin")}
        assert (one.run()[0][:, 0] == together[0][:, i]).all()


@bfloat16
def test_what_has_no_place_in_the_cache_is_refused() -> None:
    for last in (41, 2, -1, 2**31 - 1):
        call = Call((1, 9, 20, 2, 2, 16))
        call.feed["last"][0] = last
        with pytest.raises(Exception, match="do not go together"):
            call.run()
    call = Call((1, 9, 20, 2, 2, 16))
    call.feed["v"] = call.feed["v"][:, :4]
    with pytest.raises(Exception, match="do not go together"):
        call.run()


# -- rows and products -----------------------------------------------------------------------

KINDS = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.int8): TensorProto.INT8}


def called(
    op: str, outputs: list[str], inputs: dict[str, Array], weights: dict[str, Array], **more: Any
) -> list[Array]:
    """What a kernel makes of its inputs, in a graph of its own. weights: inputs that are stored."""
    order = list(more.pop("order", [*inputs, *weights]))
    node = helper.make_node(op, order, outputs, "n", domain=library.DOMAIN, **more)
    ports = [
        helper.make_tensor_value_info(
            name, KINDS.get(x.dtype, TensorProto.FLOAT), [None] * (x.ndim - 1) + [x.shape[-1]]
        )
        for name, x in inputs.items()
    ]
    axes = [None] * next(iter(inputs.values())).ndim
    results = [
        helper.make_tensor_value_info(
            n, TensorProto.UINT8 if n == "codes" else TensorProto.FLOAT, axes
        )
        for n in outputs
    ]
    stored = [numpy_helper.from_array(x, name) for name, x in weights.items()]
    graph = helper.make_graph([node], "rows", ports, results, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(library.DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return list(session(model, 2).run(outputs, inputs))


def require_rounded(codes: Array, steps: Array, wanted: Array) -> None:
    largest = np.abs(wanted).max(-1, keepdims=True)
    np.testing.assert_allclose(127 * steps, largest, rtol=1e-5, atol=1e-6)
    values = (codes.astype(np.float32) - 128) * steps
    assert (np.abs(values - wanted) <= 0.501 * steps + 1e-6).all()


ROWS = [(1, 1), (3, 16), (2, 5, 37), (40, 200)]


@pytest.mark.parametrize("shape", ROWS)
def test_norms_and_sums_are_rounded(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    x, other = 3 * random.standard_normal((2, *shape), np.float32)
    weight = random.standard_normal(shape[-1], np.float32)
    scales = random.uniform(0.5, 2, (*shape[:-1], 1)).astype(np.float32)
    w = Weights({"n.weight": weight}, ("n",))
    codes, steps = called(
        native_decoder.NORM, ["codes", "steps"], {"x": x}, {"w": weight}, epsilon=1e-5
    )
    require_rounded(codes, steps, NumpyOps().rms_norm(x, w, 1e-5))
    given = {"x": x, "scales": scales, "other": other}
    y, codes, steps = called(
        native_decoder.SUM, ["y", "codes", "steps"], given, {"w": weight}, epsilon=1e-5
    )
    np.testing.assert_allclose(y, x * scales + other, rtol=1e-6, atol=1e-6)
    require_rounded(codes, steps, NumpyOps().rms_norm(y, w, 1e-5))


@pytest.mark.parametrize("shape", ROWS)
def test_gates_are_rounded(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(1)
    gate, up = 4 * random.standard_normal((2, *shape), np.float32)
    gate.reshape(-1)[0] = -200
    scales = random.uniform(0.5, 2, (*shape[:-1], 1)).astype(np.float32)
    given = {"gate": gate, "up": up, "scales": scales}
    codes, steps = called(native_decoder.GATE, ["codes", "steps"], given, {})
    require_rounded(codes, steps, NumpyOps().swiglu(gate * scales, up * scales))


def test_a_row_with_no_number_says_so_in_its_step() -> None:
    x = np.ones((5, 20), np.float32)
    x[1, 3], x[2, 4] = np.nan, np.inf
    ones = np.ones(20, np.float32)
    _, steps = called(native_decoder.NORM, ["codes", "steps"], {"x": x}, {"w": ones}, epsilon=1e-5)
    assert np.isfinite(steps[[0, 3, 4]]).all() and np.isnan(steps[[1, 2]]).all()
    given = {"gate": x, "up": x, "scales": ones[:5, None]}
    _, steps = called(native_decoder.GATE, ["codes", "steps"], given, {})
    assert np.isfinite(steps[[0, 3, 4]]).all() and not np.isfinite(steps[[1, 2]]).any()


def rows_and_weights(count: int, inputs: int, outputs: int) -> tuple[dict[str, Array], Array]:
    random = np.random.default_rng(count)
    codes = random.integers(1, 256, (1, count, inputs), np.uint8)
    steps = random.uniform(0.01, 0.02, (1, count, 1)).astype(np.float32)
    return {"c": codes, "s": steps}, random.integers(-128, 128, (2, inputs, outputs), np.int8)


# rows, inputs, outputs: one row, parts of blocks of six and of panels of 64, more than a part
PRODUCTS = [(1, 4, 1), (5, 64, 70), (6, 128, 64), (7, 36, 130), (203, 96, 72)]


@pytest.mark.parametrize("sizes", PRODUCTS)
def test_products_are_those_of_integers(sizes: tuple[int, int, int]) -> None:
    rows, (weight, _) = rows_and_weights(*sizes)
    random = np.random.default_rng(9)
    scales, bias = random.standard_normal((2, sizes[2]), np.float32)
    other = random.standard_normal((1, sizes[0], sizes[2]), np.float32)
    sums = (rows["c"].astype(np.int64) - 128) @ weight.astype(np.int64)
    wanted = sums * scales.astype(np.float64) * rows["s"] + bias
    stored = {"w": weight, "scales": scales, "bias": bias}
    (y,) = called(native_products.PRODUCT, ["y"], rows, stored)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    (y,) = called(
        *(native_products.PRODUCT_ONTO, ["y"], {**rows, "other": other}, stored),
        order=["c", "s", "w", "scales", "bias", "other"],
    )
    np.testing.assert_allclose(y, wanted + other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", PRODUCTS)
def test_activated_products_are_rounded(sizes: tuple[int, int, int], activation: int) -> None:
    rows, (weight, _) = rows_and_weights(*sizes)
    bias = np.random.default_rng(7).standard_normal(sizes[2], np.float32)
    sums = (rows["c"].astype(np.int64) - 128) @ weight.astype(np.int64)
    x = (sums * 0.002 * rows["s"] + bias).astype(np.float32)
    stored = {"w": weight, "scales": np.full(sizes[2], 0.002, "f"), "bias": bias}
    how = {"activation": activation, "alpha": 1.702}
    codes, steps = called(native_products.ACTIVATED, ["codes", "steps"], rows, stored, **how)
    require_rounded(codes, steps, ACTIVATIONS[activation](x))


@pytest.mark.parametrize("sizes", PRODUCTS)
def test_gated_products_are_rounded(sizes: tuple[int, int, int]) -> None:
    rows, weights = rows_and_weights(*sizes)
    scales = np.random.default_rng(8).uniform(0.001, 0.002, (2, sizes[2])).astype(np.float32)
    codes = rows["c"].astype(np.int64) - 128
    gate, up = (
        (codes @ w.astype(np.int64) * s * rows["s"]).astype(np.float32)
        for w, s in zip(weights, scales, strict=True)
    )
    stored = {"g": weights[0], "gs": scales[0], "u": weights[1], "us": scales[1]}
    found, steps = called(native_products.GATED, ["codes", "steps"], rows, stored)
    require_rounded(found, steps, NumpyOps().swiglu(gate, up))


def test_a_row_of_a_product_does_not_depend_on_others() -> None:
    rows, (weight, _) = rows_and_weights(100, 64, 70)
    stored = {"w": weight, "scales": np.ones(70, "f"), "bias": np.zeros(70, "f")}
    (whole,) = called(native_products.PRODUCT, ["y"], rows, stored)
    for first, last in ((0, 1), (1, 3), (7, 12), (40, 100)):
        some = {name: np.ascontiguousarray(x[:, first:last]) for name, x in rows.items()}
        (part,) = called(native_products.PRODUCT, ["y"], some, stored)
        assert (part == whole[:, first:last]).all()


def test_a_weight_that_is_given_late_or_odd_is_refused() -> None:
    rows, (weight, _) = rows_and_weights(2, 64, 70)
    stored = {"scales": np.ones(70, "f"), "bias": np.zeros(70, "f")}
    order = ["c", "s", "w", "scales", "bias"]
    with pytest.raises(Exception, match="no constant"):
        called(native_products.PRODUCT, ["y"], {**rows, "w": weight}, stored, order=order)
    stored["w"] = weight[:63]
    with pytest.raises(Exception, match="no \\[4n"):
        called(native_products.PRODUCT, ["y"], rows, stored, order=order)
    stored["w"] = weight[:60]
    with pytest.raises(Exception, match="do not go together"):
        called(native_products.PRODUCT, ["y"], rows, stored, order=order)
