"""What one call of each op costs, from shapes alone: arithmetic, and the elements that it moves.

Every function takes the op's result and then the op's own arguments, shapes in place of tensors.

FLOPs: an addition, product, quotient, comparison, square root, exponential or erf of floats is
one, so a multiply-add is two, and reducing n values counts n. Arithmetic on indices is none.
Elements: every operand is read once and every result written once, whatever a cache holds and
whatever a kernel keeps for itself (the scores of attention, for one). Gathers read the rows that
they return, not the table. Indices and masks count as elements like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgevlm.toolkit.ops.shape_ops import Spec
from edgevlm.toolkit.ops.vocabulary import Array, EightBits, Step, Weights

_SIGMOID = 4  # negate, exp, add, divide
_SOFTMAX = 5  # maximum, subtract, exp, sum, divide
_ROTATION = 3  # of one channel: two products and a sum


@dataclass(frozen=True)
class Parameter(Spec):
    """The shape of a tensor in the weights file: reading it counts as weights."""


@dataclass(frozen=True)
class Cost:
    """Work of one call of an op, at the path of the parameters used last.

    flops: floating-point operations; all others are numbers of elements.
    weight_elements: parameters and tables of the weights file that are read;
    matrix_elements: of these, those of a matrix that a precision plan can store in 8 or 4 bits;
    matrix_inputs: channels along which such a matrix is divided into blocks;
    read_elements, written_elements: activations;
    kv_read_elements, kv_written_elements: entries of the KV cache.
    """

    op: str = ""
    path: str = ""
    flops: int = 0
    weight_elements: int = 0
    matrix_elements: int = 0
    matrix_inputs: int = 0
    read_elements: int = 0
    written_elements: int = 0
    kv_read_elements: int = 0
    kv_written_elements: int = 0

    @property
    def activation_elements(self) -> int:
        """Activations, read and written."""
        return self.read_elements + self.written_elements

    @property
    def kv_elements(self) -> int:
        """Entries of the KV cache, read and written."""
        return self.kv_read_elements + self.kv_written_elements


def _moved(flops: int, y: Spec, *operands: Spec | None, gathered: int = 0) -> Cost:
    """`operands` whole and `gathered` more elements are read, y is written."""
    tensors = [x for x in operands if x is not None]
    weights = sum(x.size for x in tensors if isinstance(x, Parameter))
    read = sum(x.size for x in tensors) - weights + gathered
    return Cost(flops=flops, weight_elements=weights, read_elements=read, written_elements=y.size)


# -- with parameters -------------------------------------------------------------------------


def linear(y: Spec, x: Spec, w: Weights[Spec]) -> Cost:
    """2 * rows * in * out, and one addition per output where there is a bias."""
    weight, bias = w["weight"], w.get("bias")
    return _product(y, x, weight, bias, inputs=weight.shape[0])


def unembed(y: Spec, x: Spec, w: Weights[Spec]) -> Cost:
    """2 * rows * D * V; reads the whole table."""
    weight = w["weight"]
    return _product(y, x, weight, None, inputs=weight.shape[1])


def _product(y: Spec, x: Spec, weight: Spec, bias: Spec | None, *, inputs: int) -> Cost:
    cost = _moved(y.size * (2 * inputs + (bias is not None)), y, x, weight, bias)
    matrix = weight.size if isinstance(weight, Parameter) else 0
    return replace(cost, matrix_elements=matrix, matrix_inputs=inputs)


def embed(y: Spec, ids: Spec, w: Weights[Spec]) -> Cost:
    """No arithmetic; reads the ids and one row of the table for each."""
    cost = _moved(0, y, ids, Parameter(y.shape))
    return replace(cost, matrix_elements=y.size, matrix_inputs=y.shape[-1])


def conv(
    y: Spec, x: Spec, w: Weights[Spec], *, stride: int, padding: int = 0, groups: int = 1
) -> Cost:
    """2 * outputs * (C / groups) * k * k, taps in the padding included, and the bias."""
    weight, bias = w["weight"], w.get("bias")
    taps = weight.size // weight.shape[0]
    cost = _moved(y.size * (2 * taps + (bias is not None)), y, x, weight, bias)
    matrix = weight.size if isinstance(weight, Parameter) else 0
    return replace(cost, matrix_elements=matrix, matrix_inputs=taps)


def layer_norm(y: Spec, x: Spec, w: Weights[Spec], eps: float) -> Cost:
    """Seven per element (sum, subtract, square, sum, divide, weight, bias) and four per row."""
    flops = 7 * x.size + 4 * (x.size // x.shape[-1])
    return _moved(flops, y, x, w["weight"], w["bias"])


def rms_norm(y: Spec, x: Spec, w: Weights[Spec], eps: float) -> Cost:
    """Four per element (square, sum, divide, weight) and three per row (divide, eps, root)."""
    return _moved(4 * x.size + 3 * (x.size // x.shape[-1]), y, x, w["weight"])


# -- elementwise -----------------------------------------------------------------------------


def add(y: Spec, a: Spec, b: Spec) -> Cost:
    """Of add and of mul: one per output; an operand that is broadcast is read once."""
    return _moved(y.size, y, a, b)


def scale(y: Spec, x: Spec, factor: float) -> Cost:
    """One product per element; the factor is part of the op."""
    return _moved(x.size, y, x)


def gelu(y: Spec, x: Spec, *, tanh: bool = False) -> Cost:
    """x * 0.5 * (1 + erf(x / sqrt 2)): five; the tanh form with its cubic: nine."""
    return _moved((9 if tanh else 5) * x.size, y, x)


def quick_gelu(y: Spec, x: Spec) -> Cost:
    """Two products and a sigmoid: six per element."""
    return _moved((2 + _SIGMOID) * x.size, y, x)


def swiglu(y: Spec, gate: Spec, up: Spec) -> Cost:
    """A sigmoid and two products: six per element."""
    return _moved((2 + _SIGMOID) * y.size, y, gate, up)


def relu(y: Spec, x: Spec, *, limit: float | None = None) -> Cost:
    """One comparison per element, two with a limit."""
    return _moved((1 if limit is None else 2) * x.size, y, x)


def sigmoid(y: Spec, x: Spec) -> Cost:
    """Four per element: negate, exp, add, divide."""
    return _moved(_SIGMOID * x.size, y, x)


def softmax(y: Spec, x: Spec) -> Cost:
    """Five per element: maximum, subtract, exp, sum, divide."""
    return _moved(_SOFTMAX * x.size, y, x)


def mean(y: Spec, x: Spec, axes: tuple[int, ...]) -> Cost:
    """One addition per input and one division per output."""
    return _moved(x.size + y.size, y, x)


def sum_(y: Spec, x: Spec, axes: tuple[int, ...]) -> Cost:
    """One addition per input."""
    return _moved(x.size, y, x)


def response_norm(y: Spec, x: Spec, w: Weights[Spec], eps: float) -> Cost:
    """Three per element (square, sum, product), five per channel and two per image.

    Per channel: root, sum for the mean, divide, weight, plus one; per image: divide, eps.
    """
    batch, channels = x.shape[0], x.shape[-1]
    return _moved(3 * x.size + batch * (5 * channels + 2), y, x, w["weight"])


# -- attention -------------------------------------------------------------------------------


def attention(y: Spec, q: Spec, k: Spec, v: Spec, *, num_heads: int) -> Cost:
    """Per head and pair of tokens: 2 * head_dim for the score, 2 * head_dim for the mix, and
    one for the scale and five for the softmax.
    """
    batch, length, channels = q.shape
    return _moved(_attend(batch * length * k.shape[1], channels, num_heads), y, q, k, v)


def attention_relative(
    y: Spec, q: Spec, k: Spec, v: Spec, w: Weights[Spec], *, num_heads: int, grid: tuple[int, int]
) -> Cost:
    """Attention; two more per score; 2 * head_dim * (H + W) per query and head for the biases."""
    pairs = q.shape[0] * q.shape[1] ** 2
    biases = 2 * num_heads * pairs + 2 * q.size * sum(grid)
    flops = _attend(pairs, q.shape[2], num_heads) + biases
    return _moved(flops, y, q, k, v, w["rows"], w["columns"])


def _attend(pairs: int, channels: int, num_heads: int) -> int:
    """FLOPs of attention for so many (query, key) pairs, heads of channels / num_heads."""
    return pairs * (4 * channels + (1 + _SOFTMAX) * num_heads)


def attention_cached(
    y: tuple[Spec, Spec, Spec],
    q: Spec,
    k: Spec,
    v: Spec,
    past: tuple[Spec, Spec],
    step: Step[Spec],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
) -> Cost:
    """Attention of the last S of T cached tokens: token i sees T - S + i of them, at most
    `window`; three more per channel of q and k for their rotation.

    The cache is taken to be full (T its length): k and v are written into it, and the rows that
    any of the S tokens sees are read. The mask follows from the positions and is not read; of
    the rotary tables a row of each is read per token.
    """
    batch, length, channels = q.shape
    rows = past[0].shape[2]
    most = rows if window is None else window
    pairs = batch * sum(min(rows - i, most) for i in range(length))
    flops = _attend(pairs, channels, num_heads) + _ROTATION * (q.size + k.size)
    rows_read = min(rows, most + length - 1)
    angles = 2 * batch * length * step.cos.shape[1]
    return Cost(
        flops=flops,
        weight_elements=angles,
        read_elements=q.size + k.size + v.size + step.positions.size,
        written_elements=y[0].size,
        kv_read_elements=sum(batch * p.shape[1] * rows_read * p.shape[3] for p in past),
        kv_written_elements=k.size + v.size,
    )


def attention_rotary(
    y: Spec, q: Spec, k: Spec, v: Spec, angles: Spec, *, num_heads: int, head_dim: int
) -> Cost:
    """Sine and cosine of every angle, three per channel of q and k, and the attention."""
    batch, length, channels = q.shape
    rotation = 2 * angles.size + _ROTATION * (q.size + k.size)
    pairs = batch * length * k.shape[1]
    return _moved(_attend(pairs, channels, num_heads) + rotation, y, q, k, v, angles)


def ms_deform_attn(
    y: Spec,
    value: Spec,
    offsets: Spec,
    scores: Spec,
    *,
    grid: tuple[int, int],
    num_levels: int,
    num_heads: int,
    num_points: int,
    head_dim: int,
    reference: Array,
) -> Cost:
    """Per sample (one of batch * queries * heads * levels * points): its position, its four
    corners' weights, and 4 corners and one mix of 2 * head_dim each.

    Position: four per coordinate. Corner weights: floor, fraction and complement of both
    coordinates, four products. The softmax of the scores adds five. Four corners of head_dim
    values are read per sample, those outside included.
    """
    samples = scores.size
    per_sample = 2 * 4 + 2 * 3 + 4 + (4 + 1) * 2 * head_dim + _SOFTMAX
    gathered = samples * 4 * head_dim
    table = Parameter(reference.shape)
    return _moved(samples * per_sample, y, offsets, scores, table, gathered=gathered)


def positions(y: Spec, ids: Spec, start: Spec) -> Cost:
    """No floats; reads one start per row and writes the indices: of ids only the shape counts."""
    return _moved(0, y, start)


def causal_mask(y: Spec, positions: Spec, cache: Spec, window: int | None) -> Cost:
    """No floats; reads the positions and writes the mask: of the cache only the length counts."""
    return _moved(0, y, positions)


# -- tokens ----------------------------------------------------------------------------------


def place_tokens(y: Spec, x: Spec, features: Spec, rows: Spec) -> Cost:
    """No arithmetic; reads the indices and, for each token, one row of x or of the features."""
    return _moved(0, y, rows, gathered=y.size)


def take(y: Spec, x: Spec, at: Spec) -> Cost:
    """No arithmetic; reads the indices and the rows that it returns."""
    return _moved(0, y, at, gathered=y.size)


def prepend(y: Spec, x: Spec, tokens: Spec) -> Cost:
    """No arithmetic; reads both and writes the joined rows."""
    return _moved(0, y, x, tokens)


def weighted_gather(y: Spec, x: Spec, rows: Spec, weights: Spec) -> Cost:
    """A multiply-add per gathered element: rows [O, K] of D channels, 2 * O * K * D."""
    gathered = rows.size * x.shape[1]
    return _moved(2 * gathered, y, rows, weights, gathered=gathered)


def max_gather(y: Spec, x: Spec, rows: Spec) -> Cost:
    """A comparison per gathered element: rows [O, K] of D channels, O * K * D."""
    gathered = rows.size * x.shape[1]
    return _moved(gathered, y, rows, gathered=gathered)


# -- shape -----------------------------------------------------------------------------------


def concat(y: Spec, xs: Sequence[Spec], axis: int) -> Cost:
    """No arithmetic; every tensor is copied."""
    return _moved(0, y, *xs)


def slice_(y: Spec, x: Spec, axis: int, start: int, stop: int | None, step: int = 1) -> Cost:
    """No arithmetic; what is cut out is copied, the rest is not read."""
    cut = Parameter(y.shape) if isinstance(x, Parameter) else Spec(y.shape)
    return _moved(0, y, cut)


def copied(y: Spec, x: Spec, axes: tuple[int, ...] = ()) -> Cost:
    """Of transpose and to_float32: no arithmetic; every element is copied."""
    return _moved(0, y, x)


def free(y: Spec, *operands: object) -> Cost:
    """Of reshape and constant: nothing moves; what uses the view or the table reads it."""
    return Cost()


# -- precision -------------------------------------------------------------------------------


def fake_quant(
    y: Spec, x: Spec, scale: Array, *, axis: int | None, path: str, to: EightBits = "int8"
) -> Cost:
    """Five per element: divide, round, two limits, product; the scales are weights."""
    return _moved(5 * x.size, y, x, Parameter(scale.shape))


# An op without an entry cannot be counted: a KeyError names it.
COSTS: dict[str, Callable[..., Cost]] = {
    "linear": linear,
    "unembed": unembed,
    "embed": embed,
    "conv": conv,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "add": add,
    "mul": add,
    "scale": scale,
    "gelu": gelu,
    "quick_gelu": quick_gelu,
    "swiglu": swiglu,
    "relu": relu,
    "sigmoid": sigmoid,
    "softmax": softmax,
    "mean": mean,
    "sum": sum_,
    "response_norm": response_norm,
    "attention": attention,
    "attention_relative": attention_relative,
    "attention_cached": attention_cached,
    "attention_rotary": attention_rotary,
    "ms_deform_attn": ms_deform_attn,
    "positions": positions,
    "causal_mask": causal_mask,
    "place_tokens": place_tokens,
    "take": take,
    "prepend": prepend,
    "weighted_gather": weighted_gather,
    "max_gather": max_gather,
    "concat": concat,
    "slice": slice_,
    "reshape": free,
    "transpose": copied,
    "constant": free,
    "to_float32": copied,
    "fake_quant": fake_quant,
}

# Wrappers run these as the ops inside.
COMPOSITE = ("block", "layer_merge")
