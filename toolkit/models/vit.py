"""Pre-norm transformer blocks, shared by the vision transformers.

x += scale1 * attention(norm1(x)); x += scale2 * mlp(norm2(x)); scales only where the tower has
them (DINOv2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypedDict

from edgevlm.toolkit.models.recipes import Recipe, flip, keep
from edgevlm.toolkit.models.taps import depth_needed
from edgevlm.toolkit.ops.vocabulary import Ops, T, Weights
from edgevlm.toolkit.strict import MOST_LAYERS, Reader

Shapes = dict[str, tuple[int, ...]]


class Vit(Protocol):
    """The configuration fields that blocks read."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def eps(self) -> float: ...

    @property
    def activation(self) -> str: ...

    @property
    def taps(self) -> tuple[int, ...]: ...


class SharedFields(TypedDict):
    """What the configurations of the vision transformers have in common."""

    hidden_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    activation: str
    eps: float


def read(
    r: Reader,
    activations: Sequence[str],
    *,
    hidden_size: int = 768,
    num_layers: int = 12,
    num_heads: int = 12,
    patch_size: int,
    eps: float,
) -> SharedFields:
    """The fields that they share; the numbers are what a missing key means.

    activations: those implemented, the first where the key is missing.
    """
    r.choice("num_channels", [3], 3)
    hidden_size = r.count("hidden_size", hidden_size)
    return {
        "hidden_size": hidden_size,
        "num_layers": r.count("num_hidden_layers", num_layers, most=MOST_LAYERS),
        "num_heads": r.share("num_attention_heads", hidden_size, num_heads),
        "patch_size": r.count("patch_size", patch_size),
        "activation": r.choice("hidden_act", list(activations), activations[0], nullable=False),
        "eps": r.positive("layer_norm_eps", eps),
    }


class SquareImages:
    """What follows from the fields of a configuration whose images are square.

    Not a dataclass: every Config lists these fields itself, among its others.
    """

    hidden_size: int
    patch_size: int
    image_size: int
    taps: tuple[int, ...]

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the image, in pixels."""
        return self.image_size, self.image_size

    @property
    def patches(self) -> int:
        """Whole patches in an image; pixels left beside them are dropped."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Channels of each output."""
        return (self.hidden_size,) * len(self.taps)


Attend = Callable[[Ops[Any], Any, Weights[Any], Any], Any]


def activate(op: Ops[T], name: str, x: T) -> T:
    """The activation that a configuration calls `name`."""
    if name == "quick_gelu":
        return op.quick_gelu(x)
    if name == "relu6":
        return op.relu(x, limit=6.0)
    return op.gelu(x, tanh=name == "gelu_pytorch_tanh")


def attention(op: Ops[T], c: Vit, w: Weights[T], x: T, others: T | None = None) -> T:
    """Plain attention of x [B, S, hidden_size] to itself, or to `others` [B, N, hidden_size]."""
    seen = x if others is None else others
    q, k, v = op.linear(x, w / "q"), op.linear(seen, w / "k"), op.linear(seen, w / "v")
    return op.linear(op.attention(q, k, v, num_heads=c.num_heads), w / "out")


def mlp(op: Ops[T], c: Vit, w: Weights[T], x: T) -> T:
    """up, activation, down."""
    return op.linear(activate(op, c.activation, op.linear(x, w / "up")), w / "down")


def run(
    op: Ops[T],
    c: Vit,
    w: Weights[T],
    x: T,
    attend: Attend = attention,
    feed_forward: Attend = mlp,
    *,
    scaled: bool = False,
) -> tuple[T, ...]:
    """The blocks that the taps need, and the tapped hidden states (0 is x itself)."""
    hidden = [x]
    for i in range(depth_needed(c.taps)):
        x = op.block(_block, w / f"layers.{i}", x, c, attend, feed_forward, scaled)
        hidden.append(x)
    return tuple(hidden[tap] for tap in c.taps)


def _block(
    op: Ops[T],
    w: Weights[T],
    x: T,
    c: Vit,
    attend: Attend,
    feed_forward: Attend,
    scaled: bool,
) -> T:
    update = attend(op, c, w / "attention", op.layer_norm(x, w / "norm1", c.eps))
    x = op.add(op.mul(update, w["scale1"]) if scaled else update, x)
    update = feed_forward(op, c, w / "mlp", op.layer_norm(x, w / "norm2", c.eps))
    return op.add(op.mul(update, w["scale2"]) if scaled else update, x)


def patches(op: Ops[T], w: Weights[T], pixels: T, hidden_size: int, patch_size: int) -> T:
    """Patch embedding, row by row: [B, 3, H, W] -> [B, H / patch * W / patch, hidden_size]."""
    grid = op.conv(pixels, w / "patch", stride=patch_size)
    return op.transpose(op.reshape(grid, (0, hidden_size, -1)), (0, 2, 1))


def pooled(op: Ops[T], c: Vit, w: Weights[T], x: T) -> T:
    """The first token behind its own norm: [B, S, hidden_size] -> [B, hidden_size]."""
    token = op.reshape(op.slice(x, 1, 0, 1), (0, c.hidden_size))
    return op.layer_norm(token, w / "norm_post", c.eps)


def linear_shapes(sizes: Mapping[str, tuple[int, int]], bias: bool = True) -> Shapes:
    """Weight and bias of linears named in `sizes` as (in, out)."""
    shapes: Shapes = {}
    for name, size in sizes.items():
        shapes[f"{name}.weight"] = size
        if bias:
            shapes[f"{name}.bias"] = size[1:]
    return shapes


def norm_shapes(*names: str, hidden_size: int) -> Shapes:
    """Weight and bias of layer norms."""
    return {f"{name}.{leaf}": (hidden_size,) for name in names for leaf in ("weight", "bias")}


def block_shapes(c: Vit, count: int) -> Shapes:
    """The tensors of `count` plain blocks."""
    d = c.hidden_size
    sizes = {f"attention.{name}": (d, d) for name in ("q", "k", "v", "out")}
    sizes |= {"mlp.up": (d, c.intermediate_size), "mlp.down": (c.intermediate_size, d)}
    block = linear_shapes(sizes) | norm_shapes("norm1", "norm2", hidden_size=d)
    return {f"layers.{i}.{name}": shape for i in range(count) for name, shape in block.items()}


# -- Hugging Face's names for the CLIP family --------------------------------------------------

_CLIP_LAYER = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
}


def clip_block_names(count: int) -> dict[str, Recipe]:
    """Where the tensors of `count` blocks stand in CLIP, SigLIP and MLCD files."""
    table = {}
    for i in range(count):
        for ours, theirs in _CLIP_LAYER.items():
            source = f"encoder.layers.{i}.{theirs}"
            change = keep if ours.startswith("norm") else flip
            table[f"layers.{i}.{ours}.weight"] = change(f"{source}.weight")
            table[f"layers.{i}.{ours}.bias"] = keep(f"{source}.bias")
    return table


def clip_pooled_names() -> dict[str, Recipe]:
    """Where the norm of `pooled` stands in CLIP and MLCD files."""
    return {f"norm_post.{leaf}": keep(f"post_layernorm.{leaf}") for leaf in ("weight", "bias")}


def clip_unused(taps: tuple[int, ...], num_layers: int) -> tuple[str, ...]:
    """Globs of what a complete tower has behind the last tapped block."""
    pruned = (f"encoder.layers.{i}.*" for i in range(depth_needed(taps), num_layers))
    return ("post_layernorm.*", "embeddings.position_ids", *pruned)
