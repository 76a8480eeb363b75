"""The cost of every op against a formula written here, on shapes whose axes all differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from edgevlm.toolkit.ops.costs import COMPOSITE, COSTS, Parameter
from edgevlm.toolkit.ops.shape_ops import ShapeOps, Spec
from edgevlm.toolkit.ops.vocabulary import Ops, Step, Weights
from edgevlm.toolkit.ops.wrappers import Count, Wrapper

SIGMOID, SOFTMAX = 4, 5  # negate, exp, add, divide; maximum, subtract, exp, sum, divide


def s(*shape: int) -> Spec:
    return Spec(shape)


@dataclass(frozen=True)
class Expected:
    """One op called on `weights`, and what it has to cost; `reads` and `writes`: activations."""

    call: Callable[[Any, Weights[Spec]], Any]
    flops: int
    reads: int
    writes: int
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    weight_elements: int = 0
    matrix: tuple[int, int] = (0, 0)
    kv: tuple[int, int] = (0, 0)


def counted(case: Expected) -> Count:
    counter = Count(ShapeOps(), "part")
    case.call(counter, parameters(case.weights))
    return counter


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> Weights[Spec]:
    return Weights({key: Parameter(shape) for key, shape in shapes.items()})


def _cached(length: int, window: int | None, visible: list[int], rows_read: int) -> Expected:
    """3 rows of a batch, 4 heads and 2 of keys and values with 6 channels, a cache of 11 rows.

    visible: how many rows each token sees.
    """
    batch, heads, kv_heads, d, rows = 3, 4, 2, 6, 11
    cache = s(batch, kv_heads, rows, d)
    step = Step(s(batch, length), s(batch, 1, length, rows), s(50, d // 2), s(50, d // 2))
    q, kv = batch * length * heads * d, batch * length * kv_heads * d
    pairs = batch * heads * sum(visible)
    return Expected(
        lambda op, w: op.attention_cached(
            s(batch, length, heads * d),
            s(batch, length, kv_heads * d),
            s(batch, length, kv_heads * d),
            (cache, cache),
            step,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=d,
            window=window,
        ),
        # two products of d multiply-adds, a scale and a softmax; rotation: 3 per channel
        flops=pairs * (2 * d + 2 * d + 1 + SOFTMAX) + 3 * (q + kv),
        reads=q + 2 * kv + batch * length,
        writes=q,
        weight_elements=batch * length * 2 * (d // 2),
        kv=(2 * batch * kv_heads * rows_read * d, 2 * kv),
    )


def _deform() -> Expected:
    """2 images, 5 queries, 3 heads of 7 channels, 4 points on 2 levels of 3 x 4."""
    batch, queries, heads, d, points, levels = 2, 5, 3, 7, 4, 2
    samples = batch * queries * heads * levels * points
    reference = np.zeros((queries, 2), np.float32)
    corner_weights = 2 + 2 + 2 + 4  # floors, fractions, complements; four products
    return Expected(
        lambda op, w: op.ms_deform_attn(
            s(batch, levels * 12, heads * d),
            s(batch, queries, heads * levels * points * 2),
            s(batch, queries, heads * levels * points),
            grid=(3, 4),
            num_levels=levels,
            num_heads=heads,
            num_points=points,
            head_dim=d,
            reference=reference,
        ),
        flops=samples * (2 * 4 + corner_weights + 4 * 2 * d + 2 * d + SOFTMAX),
        reads=2 * samples + samples + samples * 4 * d,
        writes=batch * queries * heads * d,
        weight_elements=reference.size,
    )


def _relative() -> Expected:
    """2 images of 3 x 4 cells, 5 heads of 6 channels."""
    batch, height, width, heads, d = 2, 3, 4, 5, 6
    cells, x = height * width, s(batch, height * width, heads * d)
    pairs = batch * heads * cells * cells
    tables = {"r.rows": (2 * height - 1, d), "r.columns": (2 * width - 1, d)}
    return Expected(
        lambda op, w: op.attention_relative(
            x, x, x, w / "r", num_heads=heads, grid=(height, width)
        ),
        # as attention, and two biases added to each score; each is a product of d channels
        flops=pairs * (2 * d + 2 * d + 1 + SOFTMAX + 2)
        + batch * heads * cells * (height + width) * 2 * d,
        reads=3 * x.size,
        writes=x.size,
        weights=tables,
        weight_elements=(2 * height - 1) * d + (2 * width - 1) * d,
    )


X = s(2, 3, 5, 7)  # 210 elements
_NORM = {"n.weight": (7,), "n.bias": (7,)}
_SCALE = np.ones(7, np.float32)

CASES: dict[str, Expected] = {
    "linear": Expected(
        lambda op, w: op.linear(s(2, 3, 7), w / "l"),
        flops=2 * 3 * (2 * 7 * 5 + 5),
        reads=2 * 3 * 7,
        writes=2 * 3 * 5,
        weights={"l.weight": (7, 5), "l.bias": (5,)},
        weight_elements=7 * 5 + 5,
        matrix=(7 * 5, 7),
    ),
    "linear without bias": Expected(
        lambda op, w: op.linear(s(2, 3, 7), w / "l"),
        flops=2 * 3 * 2 * 7 * 5,
        reads=2 * 3 * 7,
        writes=2 * 3 * 5,
        weights={"l.weight": (7, 5)},
        weight_elements=7 * 5,
        matrix=(7 * 5, 7),
    ),
    "unembed": Expected(
        lambda op, w: op.unembed(s(2, 3, 7), w / "e"),
        flops=2 * 3 * 2 * 7 * 50,
        reads=2 * 3 * 7,
        writes=2 * 3 * 50,
        weights={"e.weight": (50, 7)},
        weight_elements=50 * 7,
        matrix=(50 * 7, 7),
    ),
    "embed": Expected(
        lambda op, w: op.embed(s(2, 3), w / "e"),
        flops=0,
        reads=2 * 3,
        writes=2 * 3 * 7,
        weights={"e.weight": (50, 7)},
        weight_elements=2 * 3 * 7,
        matrix=(2 * 3 * 7, 7),
    ),
    "conv": Expected(  # 9 x 6 with a 3 x 3 kernel, stride 2, padding 1 -> 5 x 3
        lambda op, w: op.conv(s(2, 4, 9, 6), w / "c", stride=2, padding=1),
        flops=2 * 7 * 5 * 3 * (2 * 4 * 3 * 3 + 1),
        reads=2 * 4 * 9 * 6,
        writes=2 * 7 * 5 * 3,
        weights={"c.weight": (7, 4, 3, 3), "c.bias": (7,)},
        weight_elements=7 * 4 * 9 + 7,
        matrix=(7 * 4 * 9, 4 * 9),
    ),
    "conv in groups": Expected(  # two groups: an output sees 4 / 2 channels
        lambda op, w: op.conv(s(2, 4, 9, 6), w / "c", stride=1, groups=2),
        flops=2 * 6 * 7 * 4 * 2 * (4 // 2) * 3 * 3,
        reads=2 * 4 * 9 * 6,
        writes=2 * 6 * 7 * 4,
        weights={"c.weight": (6, 2, 3, 3)},
        weight_elements=6 * 2 * 9,
        matrix=(6 * 2 * 9, 2 * 9),
    ),
    "layer_norm": Expected(
        lambda op, w: op.layer_norm(X, w / "n", 1e-5),
        flops=30 * (7 * 7 + 4),
        reads=210,
        writes=210,
        weights=_NORM,
        weight_elements=14,
    ),
    "rms_norm": Expected(
        lambda op, w: op.rms_norm(X, w / "n", 1e-5),
        flops=30 * (4 * 7 + 3),
        reads=210,
        writes=210,
        weights={"n.weight": (7,)},
        weight_elements=7,
    ),
    "add": Expected(lambda op, w: op.add(X, s(5, 1)), flops=210, reads=215, writes=210),
    "add a parameter": Expected(
        lambda op, w: op.add(X, w["p"]),
        flops=210,
        reads=210,
        writes=210,
        weights={"p": (5, 7)},
        weight_elements=35,
    ),
    "mul": Expected(lambda op, w: op.mul(s(3, 1), s(1, 7)), flops=21, reads=10, writes=21),
    "scale": Expected(lambda op, w: op.scale(X, 0.5), flops=210, reads=210, writes=210),
    "gelu": Expected(lambda op, w: op.gelu(X), flops=5 * 210, reads=210, writes=210),
    "gelu tanh": Expected(
        lambda op, w: op.gelu(X, tanh=True), flops=9 * 210, reads=210, writes=210
    ),
    "quick_gelu": Expected(
        lambda op, w: op.quick_gelu(X), flops=(2 + SIGMOID) * 210, reads=210, writes=210
    ),
    "swiglu": Expected(
        lambda op, w: op.swiglu(X, X), flops=(2 + SIGMOID) * 210, reads=420, writes=210
    ),
    "relu": Expected(lambda op, w: op.relu(X), flops=210, reads=210, writes=210),
    "relu with a limit": Expected(
        lambda op, w: op.relu(X, limit=6.0), flops=420, reads=210, writes=210
    ),
    "sigmoid": Expected(lambda op, w: op.sigmoid(X), flops=SIGMOID * 210, reads=210, writes=210),
    "softmax": Expected(lambda op, w: op.softmax(X), flops=SOFTMAX * 210, reads=210, writes=210),
    "mean": Expected(lambda op, w: op.mean(X, (1, 3)), flops=210 + 10, reads=210, writes=2 * 5),
    "sum": Expected(lambda op, w: op.sum(X, (0, 2)), flops=210, reads=210, writes=3 * 7),
    "response_norm": Expected(
        lambda op, w: op.response_norm(X, w / "n", 1e-6),
        flops=3 * 210 + 2 * (5 * 7 + 2),
        reads=210,
        writes=210,
        weights={"n.weight": (7,)},
        weight_elements=7,
    ),
    "attention": Expected(  # 3 heads of 4 channels, 5 queries, 9 keys
        lambda op, w: op.attention(s(2, 5, 12), s(2, 9, 12), s(2, 9, 12), num_heads=3),
        flops=2 * 3 * 5 * 9 * (2 * 4 + 1 + SOFTMAX + 2 * 4),
        reads=2 * 5 * 12 + 2 * 2 * 9 * 12,
        writes=2 * 5 * 12,
    ),
    "attention_cached one token": _cached(1, None, [11], 11),
    "attention_cached prompt": _cached(4, None, [8, 9, 10, 11], 11),
    "attention_cached whole cache": _cached(11, None, list(range(1, 12)), 11),
    "attention_cached window": _cached(4, 3, [3, 3, 3, 3], 6),
    "attention_cached window, whole": _cached(11, 3, [1, 2, *[3] * 9], 11),
    "attention_relative": _relative(),
    "attention_rotary": Expected(  # 3 heads of 4 channels, 5 tokens
        lambda op, w: op.attention_rotary(
            s(2, 5, 12), s(2, 5, 12), s(2, 5, 12), w["angles"], num_heads=3, head_dim=4
        ),
        flops=2 * 3 * 5 * 5 * (4 * 4 + 1 + SOFTMAX) + 3 * 2 * (2 * 5 * 12) + 2 * 5 * 2,
        reads=3 * 2 * 5 * 12,
        writes=2 * 5 * 12,
        weights={"angles": (5, 2)},
        weight_elements=10,
    ),
    "ms_deform_attn": _deform(),
    "positions": Expected(lambda op, w: op.positions(s(2, 5), s(2)), flops=0, reads=2, writes=10),
    "causal_mask": Expected(
        lambda op, w: op.causal_mask(s(2, 5), s(2, 3, 11, 4), None),
        flops=0,
        reads=10,
        writes=2 * 5 * 11,
    ),
    "place_tokens": Expected(
        lambda op, w: op.place_tokens(s(2, 5, 7), s(40, 7), s(2, 5)),
        flops=0,
        reads=2 * 5 + 2 * 5 * 7,
        writes=2 * 5 * 7,
    ),
    "take": Expected(
        lambda op, w: op.take(s(2, 50, 7), s(2, 3)), flops=0, reads=6 + 2 * 3 * 7, writes=2 * 3 * 7
    ),
    "prepend": Expected(
        lambda op, w: op.prepend(s(2, 5, 7), w["t"]),
        flops=0,
        reads=2 * 5 * 7,
        writes=2 * 8 * 7,
        weights={"t": (3, 7)},
        weight_elements=21,
    ),
    "weighted_gather": Expected(
        lambda op, w: op.weighted_gather(s(90, 7), s(5, 4), s(5, 4)),
        flops=2 * 5 * 4 * 7,
        reads=5 * 4 + 5 * 4 + 5 * 4 * 7,
        writes=5 * 7,
    ),
    "max_gather": Expected(
        lambda op, w: op.max_gather(s(90, 7), s(5, 4)),
        flops=5 * 4 * 7,
        reads=5 * 4 + 5 * 4 * 7,
        writes=5 * 7,
    ),
    "concat": Expected(
        lambda op, w: op.concat([s(2, 3), s(2, 5), w["p"]], 1),
        flops=0,
        reads=6 + 10,
        writes=2 * 9,
        weights={"p": (2, 1)},
        weight_elements=2,
    ),
    "slice": Expected(lambda op, w: op.slice(X, 2, 1, 3), flops=0, reads=84, writes=84),
    "slice of a parameter": Expected(
        lambda op, w: op.slice(w["p"], 0, 1, None),
        flops=0,
        reads=0,
        writes=6,
        weights={"p": (3, 3)},
        weight_elements=6,
    ),
    "reshape": Expected(lambda op, w: op.reshape(X, (0, -1)), flops=0, reads=0, writes=0),
    "transpose": Expected(
        lambda op, w: op.transpose(X, (0, 3, 1, 2)), flops=0, reads=210, writes=210
    ),
    "constant": Expected(lambda op, w: op.constant("t", _SCALE), flops=0, reads=0, writes=0),
    "to_float32": Expected(lambda op, w: op.to_float32(X), flops=0, reads=210, writes=210),
    "fake_quant": Expected(
        lambda op, w: op.fake_quant(X, _SCALE, axis=3, path="p"),
        flops=5 * 210,
        reads=210,
        writes=210,
        weight_elements=7,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_op_costs_what_its_formula_gives(name: str) -> None:
    case = CASES[name]
    (cost,) = counted(case).costs
    assert cost.op == name.replace(",", "").split()[0]
    assert cost.flops == case.flops
    assert cost.weight_elements == case.weight_elements
    assert (cost.read_elements, cost.written_elements) == (case.reads, case.writes)
    assert cost.activation_elements == case.reads + case.writes
    assert (cost.matrix_elements, cost.matrix_inputs) == case.matrix
    assert (cost.kv_read_elements, cost.kv_written_elements) == case.kv
    assert cost.kv_elements == sum(case.kv)


def test_every_op_has_a_cost_and_every_cost_a_case() -> None:
    ops = {name for name in vars(Ops) if not name.startswith("_")}
    assert ops - set(COMPOSITE) == set(COSTS)
    assert {name.replace(",", "").split()[0] for name in CASES} == set(COSTS)
    assert set(COMPOSITE) <= set(vars(Wrapper)), "what is not decomposed would be a KeyError"


def test_an_op_without_a_cost_is_an_error_that_names_it() -> None:
    class More(ShapeOps):
        def cube(self, x: Spec) -> Spec:
            return x

    counter: Any = Count(More(), "part")
    with pytest.raises(KeyError, match="cube"):
        counter.cube(X)


def test_a_merge_of_levels_costs_its_norms_and_one_product() -> None:
    """2 levels of [3, 5, 8] to 6 channels: what the op is made of, seen through the wrapper."""
    shapes = {
        "norm.weight": (2, 8),
        "norm.bias": (2, 8),
        "scale": (2,),
        "linear.weight": (16, 6),
        "linear.bias": (2, 6),
    }
    counter = Count(ShapeOps(), "merger")
    counter.layer_merge([s(3, 5, 8), s(3, 5, 8)], parameters(shapes), 1e-5)
    kinds = {cost.op for cost in counter.costs}
    assert {"layer_norm", "concat", "layer_merge", "mul", "sum", "add"} <= kinds
    (product,) = (c for c in counter.costs if c.op == "layer_merge")
    assert (product.path, product.flops) == ("merger/linear", 3 * 5 * 2 * 16 * 6)
    assert product.weight_elements == 16 * 6
    norms = [c for c in counter.costs if c.op == "layer_norm"]
    assert [c.flops for c in norms] == [15 * (7 * 8 + 4)] * 2
    # every parameter once: weight, bias, matrix, bias; the scales through a view three times
    assert sum(c.weight_elements for c in counter.costs) == 16 + 16 + 96 + 12 + 3 * 2
    assert [c for c in counter.costs if c.matrix_elements] == [product]


def test_a_block_is_the_ops_inside() -> None:
    def layer(op: Any, w: Weights[Spec], x: Spec, twice: bool) -> Spec:
        y: Spec = op.linear(x, w / "up")
        return op.add(y, y) if twice else y

    counter = Count(ShapeOps(), "lm")
    held = parameters({"layers.0.up.weight": (4, 3)})
    y = counter.block(layer, held / "layers.0", s(2, 4), True)
    assert y.shape == (2, 3)
    assert [(c.op, c.path) for c in counter.costs] == [
        ("linear", "lm/layers.0/up"),
        ("add", "lm/layers.0/up"),
    ]


def test_what_an_op_makes_of_a_parameter_is_an_activation_unless_it_is_a_view() -> None:
    counter: Any = Count(ShapeOps(), "part")
    view = counter.reshape(Parameter((4, 3)), (-1,))
    squashed = counter.softmax(Parameter((12,)))
    for x, weights in ((view, 12), (squashed, 0)):
        counter.add(x, x)
        assert counter.costs[-1].weight_elements == 2 * weights
        assert counter.costs[-1].read_elements == 24 - 2 * weights


def test_a_weight_that_was_computed_is_an_activation() -> None:
    """A fake-quantized matrix, for one: its product reads what the rounding wrote."""
    counter: Any = Count(ShapeOps(), "part")
    w = parameters({"l.weight": (7, 5), "l.bias": (5,)}) / "l"
    rounded = counter.fake_quant(w["weight"], _SCALE[:5], axis=1, path="l/weight")
    counter.linear(s(2, 7), w.replacing(weight=rounded))
    rounding, product = counter.costs
    assert (rounding.weight_elements, rounding.read_elements) == (35 + 5, 0)
    assert (product.weight_elements, product.read_elements) == (5, 2 * 7 + 35)
    assert product.matrix_elements == 0


def test_tables_are_known_by_name_once() -> None:
    counter: Any = Count(ShapeOps(), "part")
    for _ in range(2):
        counter.constant("rotary.cos", np.zeros((9, 4), np.float32))
    assert counter.tables == {"rotary.cos": Spec((9, 4))}
