"""OnnxOps: the interpreter that writes the model down. Values are tensor names."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgevlm.export import blocked, rows, static
from edgevlm.export.nodes import DOMAIN, ELEMENT
from edgevlm.toolkit.ops import decompositions
from edgevlm.toolkit.ops.vocabulary import Array, EightBits, R, Step, Weights
from edgevlm.toolkit.quantization.plan import PrecisionPlan


class OnnxOps:
    """Collects nodes; `constants` are tables of the weights file, `small` ones stay inline.

    quantized: the weights that the graph takes in 8 or 4 bits, as the plan wants; channels, static:
    those whose inputs are in 8 bits too.
    """

    def __init__(
        self,
        component: str,
        dtype: str,
        shapes: Mapping[str, tuple[int, ...]],
        plan: PrecisionPlan | None = None,
    ) -> None:
        self.dtype = dtype
        self.quantized = blocked.QuantizedWeights(shapes)
        self.channels = rows.ChannelWeights(shapes)
        self._plan = plan or PrecisionPlan()
        self.static = static.StaticWeights(shapes, self._plan)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.small: dict[str, onnx.TensorProto] = {}
        self.functions: set[str] = set()
        self._component = component
        self._shapes = shapes
        self._scope = component
        self._taken: set[str] = set()

    # -- recording -------------------------------------------------------------------------

    def emit(
        self, kind: str, inputs: Sequence[str], name: str = "", outputs: int = 1, **attrs: Any
    ) -> list[str]:
        """One node named after its path; a kind "edgevlm.X" calls our function X."""
        domain, _, plain = kind.rpartition(".")
        if domain == DOMAIN:
            self.functions.add(plain)
        label = self._unique(name or f"{self._scope}/{plain}")
        names = [label] if outputs == 1 else [f"{label}/{i}" for i in range(outputs)]
        node = helper.make_node(plain, list(inputs), names, name=label, domain=domain, **attrs)
        self.nodes.append(node)
        return names

    def one(self, kind: str, inputs: Sequence[str], name: str = "", **attrs: Any) -> str:
        """One node with one output; the output's name."""
        return self.emit(kind, inputs, name, **attrs)[0]

    def _unique(self, label: str) -> str:
        number, name = 1, label
        while name in self._taken:
            number += 1
            name = f"{label}.{number}"
        self._taken.add(name)
        return name

    def _at(self, w: Weights[str]) -> str:
        """The node name of a path with parameters; later nodes are named beside it."""
        self._scope = "/".join((self._component, *w.steps[:-1]))
        return "/".join((self._component, *w.steps))

    def ints(self, *values: int) -> str:
        """A small int64 vector, shared between its users."""
        name = "ints." + "_".join(str(v) for v in values)
        return self._inline(name, np.asarray(values, np.int64))

    def _int(self, value: int) -> str:
        return self._inline(f"int.{value}", np.asarray(value, np.int64))

    def _inline(self, name: str, value: Array) -> str:
        self.small.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def _float32(self, name: str, value: Array) -> str:
        """A float32 constant whatever the model's precision."""
        return self._inline(name, np.asarray(value, np.float32))

    def _floats(self, name: str, value: Array) -> str:
        """A constant in the model's precision."""
        kind = ELEMENT[self.dtype]
        tensor = helper.make_tensor(name, kind, value.shape, value.reshape(-1).tolist())
        self.small.setdefault(name, tensor)
        return name

    # -- structure and parameters ----------------------------------------------------------

    def block(self, function: Callable[..., R], w: Weights[str], *args: Any) -> R:
        return function(self, w, *args)

    def linear(self, x: str, w: Weights[str]) -> str:
        path, bias = self._at(w), w.get("bias")
        y = self._product(*self.static.operands(self, x, w["weight"], path), path)
        return y if bias is None else self.one("Add", [y, bias], f"{path}/bias")

    def _product(self, x: str, weight: str, path: str) -> str:
        storage = self._plan.storage_at(path)
        if weight in self._shapes:  # and not made by another op
            if self._plan.at(path) == "int8_rows":
                return self.channels.product(self, x, weight, path)
            if storage is not None and self.quantized.use(weight, storage):
                return blocked.product(self, self.quantized, x, weight, path)
        return self.one("MatMul", [x, weight], path)

    def unembed(self, x: str, w: Weights[str]) -> str:
        self._scope = self._component
        path, weight = f"{self._component}/unembed", w["weight"]
        storage = blocked.table_format(self._plan, f"{self._component}/{w.path}")
        if storage is not None and self.quantized.use(weight, storage):
            return blocked.product(self, self.quantized, x, weight, path)
        return self.one("edgevlm.Unembed", [x, weight], path)

    def embed(self, ids: str, w: Weights[str]) -> str:
        path, weight = self._at(w), w["weight"]
        storage = blocked.table_format(self._plan, path)
        if storage is not None and self.quantized.use(weight, storage):
            return blocked.rows(self, self.quantized, ids, weight, path)
        return self.one("Gather", [weight, ids], path, axis=0)

    def conv(
        self, x: str, w: Weights[str], *, stride: int, padding: int = 0, groups: int = 1
    ) -> str:
        bias, path = w.get("bias"), self._at(w)
        operands = self.static.operands(self, x, w["weight"], path)
        return self.one(
            "Conv",
            [*operands, *([] if bias is None else [bias])],
            path,
            strides=[stride] * 2,
            pads=[padding] * 4,
            dilations=[1, 1],
            group=groups,
        )

    def layer_norm(self, x: str, w: Weights[str], eps: float) -> str:
        return self.one(
            "LayerNormalization",
            [x, w["weight"], w["bias"]],
            self._at(w),
            axis=-1,
            epsilon=eps,
            stash_type=1,
        )

    def rms_norm(self, x: str, w: Weights[str], eps: float) -> str:
        return self.one(
            "RMSNormalization", [x, w["weight"]], self._at(w), axis=-1, epsilon=eps, stash_type=1
        )

    # -- elementwise -----------------------------------------------------------------------

    def add(self, a: str, b: str) -> str:
        return self.one("Add", [a, b])

    def mul(self, a: str, b: str) -> str:
        return self.one("Mul", [a, b])

    def scale(self, x: str, factor: float) -> str:
        return self.one("Mul", [x, self._floats(f"float.{factor}", np.asarray(factor))])

    def gelu(self, x: str, *, tanh: bool = False) -> str:
        return self.one("Gelu", [x], approximate="tanh" if tanh else "none")

    def quick_gelu(self, x: str) -> str:
        return self.one("edgevlm.QuickGelu", [x], alpha=1.702)

    def swiglu(self, gate: str, up: str) -> str:
        return self.one("edgevlm.SwiGLU", [gate, up])

    def relu(self, x: str, *, limit: float | None = None) -> str:
        if limit is None:
            return self.one("Relu", [x])
        low, high = (self._floats(f"float.{v}", np.asarray(v)) for v in (0.0, limit))
        return self.one("Clip", [x, low, high])

    def sigmoid(self, x: str) -> str:
        return self.one("Sigmoid", [x])

    def softmax(self, x: str) -> str:
        return self.one("Softmax", [x], axis=-1)

    def mean(self, x: str, axes: tuple[int, ...]) -> str:
        return self.one("ReduceMean", [x, self.ints(*axes)], keepdims=1)

    def sum(self, x: str, axes: tuple[int, ...]) -> str:
        return self.one("ReduceSum", [x, self.ints(*axes)], keepdims=1)

    def response_norm(self, x: str, w: Weights[str], eps: float) -> str:
        return self.one("edgevlm.ResponseNorm", [x, w["weight"]], self._at(w), epsilon=eps)

    # -- attention -------------------------------------------------------------------------

    def attention(self, q: str, k: str, v: str, *, num_heads: int) -> str:
        return self.one(
            "Attention",
            [q, k, v],
            q_num_heads=num_heads,
            kv_num_heads=num_heads,
            is_causal=0,
            softcap=0.0,
            qk_matmul_output_mode=0,
        )

    def attention_relative(
        self, q: str, k: str, v: str, w: Weights[str], *, num_heads: int, grid: tuple[int, int]
    ) -> str:
        return self.one(
            "edgevlm.RelativeAttention",
            [q, k, v, w["rows"], w["columns"]],
            self._at(w),
            num_heads=num_heads,
            head_dim=self._shapes[w.key("rows")][1],
            height=grid[0],
            width=grid[1],
        )

    def attention_cached(
        self,
        q: str,
        k: str,
        v: str,
        past: tuple[str, str],
        step: Step[str],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
    ) -> tuple[str, str, str]:
        inputs = [q, k, v, *past, step.cos, step.sin, step.positions, step.mask]
        y, key, value = self.emit(
            "edgevlm.CachedAttention",
            inputs,
            f"{self._scope}/attend",
            3,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=1 / math.sqrt(head_dim),
            window=-1 if window is None else window,
        )
        return y, key, value

    def attention_rotary(
        self, q: str, k: str, v: str, angles: str, *, num_heads: int, head_dim: int
    ) -> str:
        return self.one(
            "edgevlm.RotaryAttention",
            [q, k, v, angles],
            f"{self._scope}/attend",
            num_heads=num_heads,
            head_dim=head_dim,
        )

    def ms_deform_attn(
        self,
        value: str,
        offsets: str,
        scores: str,
        *,
        grid: tuple[int, int],
        num_levels: int,
        num_heads: int,
        num_points: int,
        head_dim: int,
        reference: Array,
    ) -> str:
        label = hashlib.sha256(reference.tobytes()).hexdigest()[:8]
        return self.one(
            "edgevlm.MSDeformAttn",
            [value, offsets, scores, self._float32(f"reference.{label}", reference)],
            num_heads=num_heads,
            num_points=num_points,
            head_dim=head_dim,
            levels=num_levels,
            height=grid[0],
            width=grid[1],
        )

    def layer_merge(self, xs: Sequence[str], w: Weights[str], eps: float) -> str:
        norm, linear, path = w / "norm", w / "linear", self._at(w)
        if self._plan.at(f"{self._component}/{linear.path}") == "int8_rows":
            return decompositions.layer_merge(self, xs, w, eps)
        levels, hidden_size = self._shapes[norm.key("weight")]
        parameters = [norm["weight"], norm["bias"], w["scale"], linear["weight"], linear["bias"]]
        return self.one(
            "edgevlm.LayerMerge",
            [self.one("Concat", list(xs), f"{path}/levels", axis=2), *parameters],
            path,
            levels=levels,
            hidden_size=hidden_size,
            epsilon=eps,
        )

    def positions(self, ids: str, start: str) -> str:
        length = self.one("Squeeze", [self.one("Shape", [ids], start=1, end=2)])
        steps = self.one("Range", [self._int(0), length, self._int(1)])
        return self.one("Add", [self.one("Unsqueeze", [start, self.ints(1)]), steps])

    def causal_mask(self, positions: str, cache: str, window: int | None) -> str:
        length = self.one("Squeeze", [self.one("Shape", [cache], start=2, end=3)])
        rows = self.one("Range", [self._int(0), length, self._int(1)])
        column = self.one("Unsqueeze", [positions, self.ints(-1)])
        visible = self.one("LessOrEqual", [rows, column])
        if window is not None:
            oldest = self.one("Sub", [column, self._int(window)])
            visible = self.one("And", [visible, self.one("Greater", [rows, oldest])])
        return self.one("Unsqueeze", [visible, self.ints(1)])

    # -- tokens ----------------------------------------------------------------------------

    def place_tokens(self, x: str, features: str, rows: str) -> str:
        chosen = self.one("Gather", [features, self.one("Max", [rows, self._int(0)])], axis=0)
        image = self.one("GreaterOrEqual", [rows, self._int(0)])
        return self.one("Where", [self.one("Unsqueeze", [image, self.ints(-1)]), chosen, x])

    def take(self, x: str, at: str) -> str:
        column = self.one("Unsqueeze", [at, self.ints(-1)])
        return self.one("GatherND", [x, column], batch_dims=1)

    def prepend(self, x: str, tokens: str) -> str:
        batch = self.one("Shape", [x], start=0, end=1)
        width = self.one("Shape", [tokens], start=-1)
        rows = self.one("Reshape", [tokens, self._ends(1, -1, width)], allowzero=0)
        many = self.one("Shape", [rows], start=1, end=3)
        shape = self.one("Concat", [batch, many], axis=0)
        return self.one("Concat", [self.one("Expand", [rows, shape]), x], axis=1)

    def _ends(self, first: int, second: int, last: str) -> str:
        return self.one("Concat", [self.ints(first, second), last], axis=0)

    def weighted_gather(self, x: str, rows: str, weights: str) -> str:
        picked = self.one("Gather", [x, rows], axis=0)
        column = self.one("CastLike", [self.one("Unsqueeze", [weights, self.ints(-1)]), x])
        weighted = self.one("Mul", [picked, column])
        return self.one("ReduceSum", [weighted, self.ints(1)], keepdims=0)

    def max_gather(self, x: str, rows: str) -> str:
        picked = self.one("Gather", [x, rows], axis=0)
        return self.one("ReduceMax", [picked, self.ints(1)], keepdims=0)

    # -- shape -----------------------------------------------------------------------------

    def concat(self, xs: Sequence[str], axis: int) -> str:
        return self.one("Concat", list(xs), axis=axis)

    def slice(self, x: str, axis: int, start: int, stop: int | None, step: int = 1) -> str:
        if start == 0 and stop is None and step == 1:
            return x
        end = np.iinfo(np.int64).max if stop is None else stop
        bounds = [self.ints(start), self.ints(end), self.ints(axis), self.ints(step)]
        return self.one("Slice", [x, *bounds])

    def reshape(self, x: str, shape: tuple[int, ...]) -> str:
        return self.one("Reshape", [x, self.ints(*shape)], allowzero=0)

    def transpose(self, x: str, axes: tuple[int, ...]) -> str:
        return self.one("Transpose", [x], perm=list(axes))

    def constant(self, name: str, value: Array) -> str:
        """A tensor of the weights file, float32 whatever the model's precision."""
        self.constants[name] = value
        return name

    def to_float32(self, x: str) -> str:
        return x if self.dtype == "fp32" else self.one("Cast", [x], to=onnx.TensorProto.FLOAT)

    # -- precision -------------------------------------------------------------------------

    def fake_quant(
        self, x: str, scale: Array, *, axis: int | None, path: str, to: EightBits = "int8"
    ) -> str:
        label = f"{self._component}/{path}"
        inputs = [self._floats(f"{label}/scale", scale), static.zeros(self, to, scale.shape)]
        along = {} if axis is None else {"axis": axis}
        stored = self.one("QuantizeLinear", [x, *inputs], f"{label}/quantize", **along)
        return self.one("DequantizeLinear", [stored, *inputs], f"{label}/dequantize", **along)
