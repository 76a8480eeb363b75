"""One case per op: the same call on every interpreter. `test_ops_agree.py` runs them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array, Ops, Step, Weights
from edgevlm.toolkit.vlm.components import Component, Dim, Port

Body = Callable[[Ops[Any], Weights[Any], dict[str, Any]], Any]


@dataclass(frozen=True)
class Case:
    """A function of one op, its parameters' shapes, and its inputs' shapes.

    integers: inputs that are int64, with the values to feed. matters: for an output that a kernel
    may leave partly undefined, where it counts.
    """

    body: Body
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    integers: dict[str, Array] = field(default_factory=dict)
    matters: dict[str, Array] = field(default_factory=dict)

    def component(self) -> Component:
        """The case as a component whose first axis changes between calls."""

        def forward(op: Ops[Any], w: Weights[Any], inputs: Any) -> dict[str, Any]:
            found = self.body(op, w, inputs)
            many = found if isinstance(found, tuple) else (found,)
            return {f"y{i}": y for i, y in enumerate(many)}

        outputs = self.outputs()
        ports = [Port(n, "float", _loose(s)) for n, s in self.inputs.items()]
        ports += [Port(n, "int64", a.shape) for n, a in self.integers.items()]
        named = tuple(Port(n, "float", _loose(y.shape)) for n, y in outputs.items())
        return Component("case", forward, self.shapes, tuple(ports), named)

    def weights(self) -> dict[str, Array]:
        """Random parameters, the same every time."""
        generator = np.random.default_rng(3)
        return {
            name: generator.normal(0, 0.5, shape).astype(np.float32)
            for name, shape in self.shapes.items()
        }

    def feed(self) -> dict[str, Array]:
        """Random inputs, the same every time."""
        generator = np.random.default_rng(4)
        drawn = {
            name: generator.normal(0, 1, shape).astype(np.float32)
            for name, shape in self.inputs.items()
        }
        return drawn | self.integers

    def outputs(self) -> dict[str, Array]:
        """What the reference says."""
        from edgevlm.toolkit.ops.numpy_ops import NumpyOps

        found = self.body(NumpyOps(), Weights(self.weights()), self.feed())
        many = found if isinstance(found, tuple) else (found,)
        return {f"y{i}": y for i, y in enumerate(many)}


def _loose(shape: tuple[int, ...]) -> tuple[Dim, ...]:
    return tuple(f"d{n}" if i == 0 else n for i, n in enumerate(shape))


def _cached_case(start: list[int], length: int, width: int = 16, window: int | None = None) -> Case:
    """A cache of 12 rows with garbage beyond what is valid; heads of `width` channels."""
    batch, rows = len(start), 12
    angles = np.random.default_rng(5).normal(size=(rows, width // 2)).astype(np.float32)

    def body(op: Ops[Any], w: Weights[Any], x: dict[str, Any]) -> Any:
        positions = op.positions(x["ids"], x["start"])
        mask = op.causal_mask(positions, x["past_k"], window)
        tables = op.constant("cos", np.cos(angles)), op.constant("sin", np.sin(angles))
        past = (x["past_k"], x["past_v"])
        return op.attention_cached(
            x["q"],
            x["k"],
            x["v"],
            past,
            Step(positions, mask, *tables),
            num_heads=4,
            num_kv_heads=2,
            head_dim=width,
            window=window,
        )

    cache = (batch, 2, rows, width)
    ends = np.asarray(start)[:, None] + length
    valid = (np.arange(rows)[None] < ends)[:, None, :, None]
    return Case(
        body,
        inputs={
            "q": (batch, length, 4 * width),
            "k": (batch, length, 2 * width),
            "v": (batch, length, 2 * width),
            "past_k": cache,
            "past_v": cache,
        },
        integers={
            "ids": np.zeros((batch, length), np.int64),
            "start": np.asarray(start, np.int64),
        },
        matters={"y1": valid, "y2": valid},
    )


def _deform_case(grid: tuple[int, int], levels: int) -> Case:
    """Two heads of three channels, two points, six queries; many points lie outside."""
    num_heads, num_points, width, queries = 2, 2, 3, 6
    reference = np.random.default_rng(8).random((queries, 2)).astype(np.float32)

    def body(op: Ops[Any], w: Weights[Any], x: dict[str, Any]) -> Any:
        return op.ms_deform_attn(
            x["value"],
            x["offsets"],
            x["scores"],
            grid=grid,
            num_levels=levels,
            num_heads=num_heads,
            num_points=num_points,
            head_dim=width,
            reference=reference,
        )

    each = num_heads * levels * num_points
    return Case(
        body,
        inputs={
            "value": (2, levels * grid[0] * grid[1], num_heads * width),
            "offsets": (2, queries, each * 2),
            "scores": (2, queries, each),
        },
    )


def _block_case() -> Case:
    """A layer of one linear, with what belongs to the call handed in beside its input."""

    def layer(op: Ops[Any], w: Weights[Any], x: Any, other: Any) -> Any:
        return op.add(op.linear(x, w / "l"), other)

    return Case(
        lambda op, w, x: op.block(layer, w / "layers.0", x["x"], x["y"]),
        {"layers.0.l.weight": (8, 6)},
        {"x": (2, 3, 8), "y": (2, 3, 6)},
    )


_NORM: dict[str, tuple[int, ...]] = {"n.weight": (8,), "n.bias": (8,)}
_ROWS = np.asarray([[0, -1, 2], [-1, -1, 1]], np.int64)

CASES: dict[str, Case] = {
    "linear": Case(
        lambda op, w, x: op.linear(x["x"], w / "l"),
        {"l.weight": (8, 6), "l.bias": (6,)},
        {"x": (2, 3, 8)},
    ),
    "linear without bias": Case(
        lambda op, w, x: op.linear(x["x"], w / "l"), {"l.weight": (8, 6)}, {"x": (2, 3, 8)}
    ),
    "unembed": Case(
        lambda op, w, x: op.unembed(x["x"], w / "e"), {"e.weight": (10, 8)}, {"x": (2, 3, 8)}
    ),
    "embed": Case(
        lambda op, w, x: op.embed(x["ids"], w / "e"),
        {"e.weight": (10, 8)},
        integers={"ids": np.asarray([[1, 9, 0], [4, 4, 2]], np.int64)},
    ),
    "conv": Case(
        lambda op, w, x: op.conv(x["x"], w / "c", stride=2),
        {"c.weight": (5, 3, 2, 2)},
        {"x": (2, 3, 6, 8)},
    ),
    "conv padded with bias": Case(
        lambda op, w, x: op.conv(x["x"], w / "c", stride=1, padding=1),
        {"c.weight": (5, 3, 3, 3), "c.bias": (5,)},
        {"x": (2, 3, 5, 7)},
    ),
    "conv depthwise": Case(
        lambda op, w, x: op.conv(x["x"], w / "c", stride=1, padding=3, groups=4),
        {"c.weight": (4, 1, 7, 7), "c.bias": (4,)},
        {"x": (2, 4, 9, 6)},
    ),
    "layer_norm": Case(
        lambda op, w, x: op.layer_norm(x["x"], w / "n", 1e-5), _NORM, {"x": (2, 3, 8)}
    ),
    "rms_norm": Case(
        lambda op, w, x: op.rms_norm(x["x"], w / "n", 1e-6), {"n.weight": (8,)}, {"x": (2, 3, 8)}
    ),
    "add": Case(lambda op, w, x: op.add(x["a"], x["b"]), inputs={"a": (2, 3, 8), "b": (2, 3, 8)}),
    "add a parameter": Case(
        lambda op, w, x: op.add(x["a"], w["p"]), {"p": (3, 8)}, {"a": (2, 3, 8)}
    ),
    "mul": Case(lambda op, w, x: op.mul(x["a"], w["p"]), {"p": (8,)}, {"a": (2, 3, 8)}),
    "scale": Case(lambda op, w, x: op.scale(x["x"], 1 / 3), inputs={"x": (2, 3, 8)}),
    "block": _block_case(),
    "gelu": Case(lambda op, w, x: op.gelu(x["x"]), inputs={"x": (2, 3, 50)}),
    "gelu tanh": Case(lambda op, w, x: op.gelu(x["x"], tanh=True), inputs={"x": (2, 3, 50)}),
    "quick_gelu": Case(lambda op, w, x: op.quick_gelu(x["x"]), inputs={"x": (2, 3, 50)}),
    "swiglu": Case(
        lambda op, w, x: op.swiglu(x["g"], x["u"]), inputs={"g": (2, 3, 50), "u": (2, 3, 50)}
    ),
    "attention": Case(
        lambda op, w, x: op.attention(x["q"], x["k"], x["v"], num_heads=4),
        inputs={"q": (2, 5, 32), "k": (2, 5, 32), "v": (2, 5, 32)},
    ),
    "attention of fewer queries than keys": Case(
        lambda op, w, x: op.attention(x["q"], x["k"], x["v"], num_heads=4),
        inputs={"q": (2, 3, 32), "k": (2, 7, 32), "v": (2, 7, 32)},
    ),
    "attention_relative": Case(
        lambda op, w, x: op.attention_relative(
            x["q"], x["k"], x["v"], w / "r", num_heads=2, grid=(3, 4)
        ),
        {"r.rows": (5, 8), "r.columns": (7, 8)},
        {"q": (2, 12, 16), "k": (2, 12, 16), "v": (2, 12, 16)},
    ),
    "relu": Case(lambda op, w, x: op.relu(x["x"]), inputs={"x": (2, 3, 8)}),
    "relu6": Case(lambda op, w, x: op.relu(x["x"], limit=0.5), inputs={"x": (2, 3, 8)}),
    "sigmoid": Case(lambda op, w, x: op.sigmoid(x["x"]), inputs={"x": (2, 3, 8)}),
    "softmax": Case(lambda op, w, x: op.softmax(x["x"]), inputs={"x": (2, 3, 8)}),
    "mean over the first and the last axis": Case(
        lambda op, w, x: op.mean(x["x"], (0, 3)), inputs={"x": (2, 3, 5, 8)}
    ),
    "sum over two axes": Case(lambda op, w, x: op.sum(x["x"], (0, 2)), inputs={"x": (3, 4, 8)}),
    "mean": Case(lambda op, w, x: op.mean(x["x"], (1, 2)), inputs={"x": (2, 3, 5, 8)}),
    "sum": Case(lambda op, w, x: op.sum(x["x"], (1,)), inputs={"x": (2, 3, 8)}),
    "response_norm": Case(
        lambda op, w, x: op.response_norm(x["x"], w / "n", 1e-6),
        {"n.weight": (8,)},
        {"x": (2, 3, 5, 8)},
    ),
    "attention_rotary": Case(
        lambda op, w, x: op.attention_rotary(
            x["q"], x["k"], x["v"], op.to_float32(w["angles"]), num_heads=4, head_dim=8
        ),
        {"angles": (5, 4)},
        {"q": (2, 5, 32), "k": (2, 5, 32), "v": (2, 5, 32)},
    ),
    "ms_deform_attn": _deform_case((3, 4), 2),
    "ms_deform_attn, one level": _deform_case((4, 4), 1),
    "layer_merge": Case(
        lambda op, w, x: op.layer_merge([x["a"], x["b"], x["c"]], w, 1e-5),
        {
            "norm.weight": (3, 8),
            "norm.bias": (3, 8),
            "scale": (3,),
            "linear.weight": (24, 6),
            "linear.bias": (3, 6),
        },
        {"a": (2, 4, 8), "b": (2, 4, 8), "c": (2, 4, 8)},
    ),
    "weighted_gather": Case(
        lambda op, w, x: op.weighted_gather(x["x"], x["rows"], x["weights"]),
        inputs={"x": (7, 8), "weights": (4, 2)},
        integers={"rows": np.asarray([[0, 6], [3, 3], [2, 1], [5, 0]], np.int64)},
    ),
    "max_gather": Case(
        lambda op, w, x: op.max_gather(x["x"], x["rows"]),
        inputs={"x": (7, 8)},
        integers={"rows": np.asarray([[0, 6, 2], [3, 3, 1]], np.int64)},
    ),
    "attention_cached prompt": _cached_case([0], 5),
    "attention_cached one token": _cached_case([5], 1),
    "attention_cached piece of a prompt": _cached_case([3], 4),
    "attention_cached rows at different places": _cached_case([5, 2], 1),
    "attention_cached heads of 8n": _cached_case([3], 4, width=24),
    "attention_cached heads of any width": _cached_case([3], 4, width=12),
    "attention_cached window, prompt": _cached_case([0], 7, window=3),
    "attention_cached window, one token": _cached_case([6], 1, window=3),
    "place_tokens": Case(
        lambda op, w, x: op.place_tokens(x["x"], x["f"], x["rows"]),
        inputs={"x": (2, 3, 8), "f": (3, 8)},
        integers={"rows": _ROWS},
    ),
    "take": Case(
        lambda op, w, x: op.take(x["x"], x["at"]),
        inputs={"x": (2, 5, 8)},
        integers={"at": np.asarray([[4, 0], [2, 2]], np.int64)},
    ),
    "prepend": Case(lambda op, w, x: op.prepend(x["x"], w["t"]), {"t": (8,)}, {"x": (2, 3, 8)}),
    "prepend several": Case(
        lambda op, w, x: op.prepend(x["x"], w["t"]), {"t": (2, 8)}, {"x": (2, 3, 8)}
    ),
    "concat": Case(
        lambda op, w, x: op.concat([x["a"], x["b"]], 1), inputs={"a": (2, 3, 8), "b": (2, 2, 8)}
    ),
    "concat on the first axis": Case(
        lambda op, w, x: op.concat([x["a"], x["b"]], 0), inputs={"a": (2, 3), "b": (4, 3)}
    ),
    "concat on the last axis, three": Case(
        lambda op, w, x: op.concat([x["a"], x["b"], x["a"]], 2),
        inputs={"a": (2, 3, 5), "b": (2, 3, 1)},
    ),
    "slice of the first axis": Case(
        lambda op, w, x: op.slice(x["x"], 0, 1, 3), inputs={"x": (4, 5, 8)}
    ),
    "slice of the last axis": Case(
        lambda op, w, x: op.slice(x["x"], 2, 3, None), inputs={"x": (2, 5, 8)}
    ),
    "slice of every second": Case(
        lambda op, w, x: op.slice(x["x"], 1, 0, -1, 2), inputs={"x": (2, 5, 8)}
    ),
    "slice": Case(lambda op, w, x: op.slice(x["x"], 1, 1, 4), inputs={"x": (2, 5, 8)}),
    "slice to the end": Case(
        lambda op, w, x: op.slice(x["x"], 1, 2, None), inputs={"x": (2, 5, 8)}
    ),
    "reshape": Case(lambda op, w, x: op.reshape(x["x"], (0, 15, -1)), inputs={"x": (2, 3, 5, 4)}),
    "reshape keeping two axes": Case(
        lambda op, w, x: op.reshape(x["x"], (0, 0, 2, -1)), inputs={"x": (2, 3, 8)}
    ),
    "reshape joining the first axes": Case(
        lambda op, w, x: op.reshape(x["x"], (-1, 8)), inputs={"x": (2, 3, 8)}
    ),
    "transpose of four axes": Case(
        lambda op, w, x: op.transpose(x["x"], (2, 0, 3, 1)), inputs={"x": (2, 3, 5, 7)}
    ),
    "mul with two axes broadcast": Case(
        lambda op, w, x: op.mul(x["a"], x["b"]), inputs={"a": (2, 3, 1, 7), "b": (3, 5, 1)}
    ),
    "attention of a batch of three": Case(
        lambda op, w, x: op.attention(x["q"], x["k"], x["v"], num_heads=2),
        inputs={"q": (3, 4, 16), "k": (3, 4, 16), "v": (3, 4, 16)},
    ),
    "attention_cached batch of three": _cached_case([0, 4, 10], 1),
    "transpose": Case(lambda op, w, x: op.transpose(x["x"], (0, 2, 1)), inputs={"x": (2, 3, 5)}),
    "fake_quant": Case(
        lambda op, w, x: op.fake_quant(x["x"], np.asarray(0.02, np.float32), axis=None, path="s"),
        inputs={"x": (2, 3, 50)},
    ),
    "fake_quant per channel": Case(
        lambda op, w, x: op.fake_quant(
            w["p"], np.linspace(0.01, 0.02, 6, dtype=np.float32), axis=1, path="s"
        ),
        {"p": (8, 6)},
    ),
    "fake_quant to fp8": Case(
        lambda op, w, x: op.fake_quant(
            x["x"], np.asarray(2.0**-8, np.float32), axis=None, path="s", to="fp8"
        ),
        inputs={"x": (2, 3, 50)},
    ),
}
