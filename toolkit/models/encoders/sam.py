"""SAM's image encoder (Kirillov et al., arXiv 2304.02643): a ViT with windows, and a neck.

Blocks attend within windows of a padded map, some over the whole map, with decomposed relative
positions. Source: facebookresearch/segment-anything; no model has it as its vision tower, so it
has no configuration of its own and its sizes follow from its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgevlm.toolkit.models import vit
from edgevlm.toolkit.models.recipes import Recipe, flip, keep, part
from edgevlm.toolkit.ops.vocabulary import Array, Ops, T, Weights

MODEL_TYPES: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    """image_size: of the square image; window: cells of a window's side; global_blocks: those that
    attend over the whole map; output_size: channels that the neck gives.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    window: int
    global_blocks: tuple[int, ...]
    output_size: int
    eps: float = 1e-6

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the image, in pixels."""
        return self.image_size, self.image_size

    @property
    def grid(self) -> int:
        """Cells of a side of the map."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Cells of the map."""
        return self.grid**2

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Channels of the output."""
        return (self.output_size,)

    def side(self, layer: int) -> int:
        """Cells of a side of what block `layer` attends over."""
        return self.grid if layer in self.global_blocks else self.window


def forward(op: Ops[T], c: Config, w: Weights[T], pixels: T) -> tuple[T, ...]:
    """pixels [B, 3, image_size, image_size] -> [B, tokens, output_size], row by row."""
    x = op.add(vit.patches(op, w, pixels, c.hidden_size, c.patch_size), w["position"])
    for i in range(c.num_layers):
        x = op.block(_block, w / f"layers.{i}", x, c, c.side(i))
    return (_neck(op, c, w / "neck", x),)


def _block(op: Ops[T], w: Weights[T], x: T, c: Config, side: int) -> T:
    normed = op.layer_norm(x, w / "norm1", c.eps)
    q, k, v = (op.linear(normed, w / "attention" / name) for name in "qkv")
    if side != c.grid:
        q, k, v = (
            _cut(op, c, y, side, (w / "attention" / name)["bias"])
            for y, name in ((q, "q"), (k, "k"), (v, "v"))
        )
    mixed = op.attention_relative(
        q, k, v, w / "attention" / "relative", num_heads=c.num_heads, grid=(side, side)
    )
    if side != c.grid:
        mixed = _joined(op, c, mixed, side)
    x = op.add(op.linear(mixed, w / "attention" / "out"), x)
    mlp, normed = w / "mlp", op.layer_norm(x, w / "norm2", c.eps)
    return op.add(op.linear(op.gelu(op.linear(normed, mlp / "up")), mlp / "down"), x)


def _cut(op: Ops[T], c: Config, x: T, side: int, bias: T) -> T:
    """The map in windows: [B, grid * grid, D] -> [B * windows, side * side, D].

    The original pads the map with zeros before the linear whose result `x` is, and attends to the
    padding too: behind the linear padding is its bias.
    """
    count = -(-c.grid // side)
    x = op.reshape(x, (0, c.grid, c.grid, c.hidden_size))
    for axis in (1, 2):
        x = _padded(op, x, axis, c.grid, count * side, bias)
    x = op.reshape(x, (-1, count, side, count, side, c.hidden_size))
    x = op.transpose(x, (0, 1, 3, 2, 4, 5))
    return op.reshape(x, (-1, side * side, c.hidden_size))


def _padded(op: Ops[T], x: T, axis: int, length: int, wanted: int, bias: T) -> T:
    """x with rows of `bias` behind, from `length` to `wanted` along an axis."""
    pieces, missing = [x], wanted - length
    while missing > 0:
        some = min(missing, length)
        rows = op.slice(x, axis, 0, some)
        pieces.append(op.add(op.scale(rows, 0.0), bias))
        missing -= some
    return op.concat(pieces, axis) if len(pieces) > 1 else x


def _joined(op: Ops[T], c: Config, x: T, side: int) -> T:
    """The inverse of `_cut`; padding is left out."""
    count = -(-c.grid // side)
    x = op.reshape(x, (-1, count, count, side, side, c.hidden_size))
    x = op.transpose(x, (0, 1, 3, 2, 4, 5))
    x = op.reshape(x, (-1, count * side, count * side, c.hidden_size))
    for axis in (1, 2):
        x = op.slice(x, axis, 0, c.grid)
    return op.reshape(x, (0, c.tokens, c.hidden_size))


def _neck(op: Ops[T], c: Config, w: Weights[T], x: T) -> T:
    """Two convolutions, each with a norm over channels; the first has a kernel of one cell."""
    x = op.layer_norm(op.linear(x, w / "0"), w / "1", c.eps)
    image = op.reshape(op.transpose(x, (0, 2, 1)), (0, c.output_size, c.grid, c.grid))
    image = op.conv(image, w / "2", stride=1, padding=1)
    flat = op.reshape(image, (0, c.output_size, c.tokens))
    return op.layer_norm(op.transpose(flat, (0, 2, 1)), w / "3", c.eps)


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors."""
    tensors: vit.Shapes = {
        "patch.weight": (c.hidden_size, 3, c.patch_size, c.patch_size),
        "patch.bias": (c.hidden_size,),
        "position": (c.tokens, c.hidden_size),
    }
    d = c.hidden_size
    sizes = {f"attention.{name}": (d, d) for name in ("q", "k", "v", "out")}
    sizes |= {"mlp.up": (d, c.intermediate_size), "mlp.down": (c.intermediate_size, d)}
    block = vit.linear_shapes(sizes) | vit.norm_shapes("norm1", "norm2", hidden_size=d)
    for i in range(c.num_layers):
        table = (2 * c.side(i) - 1, d // c.num_heads)
        own = block | {f"attention.relative.{axis}": table for axis in ("rows", "columns")}
        tensors |= {f"layers.{i}.{name}": shape for name, shape in own.items()}
    tensors["neck.0.weight"] = (d, c.output_size)
    tensors["neck.2.weight"] = (c.output_size, c.output_size, 3, 3)
    return tensors | vit.norm_shapes("neck.1", "neck.3", hidden_size=c.output_size)


def names(c: Config) -> Mapping[str, Recipe]:
    """Where each of our tensors stands in the original's file, below `image_encoder.`."""
    table = {
        "patch.weight": keep("patch_embed.proj.weight"),
        "patch.bias": keep("patch_embed.proj.bias"),
        "position": Recipe(
            ("pos_embed",),
            lambda x: np.asarray(x.reshape(-1, x.shape[-1])),
            lambda ours, stored: (ours.reshape(stored.shape),),
        ),
    }
    for i in range(c.num_layers):
        table |= {f"layers.{i}.{name}": r.below(f"blocks.{i}.") for name, r in _LAYER.items()}
    table["neck.0.weight"] = Recipe(
        ("neck.0.weight",), _matrix, lambda ours, stored: (ours.T.reshape(stored.shape),)
    )
    table["neck.2.weight"] = keep("neck.2.weight")
    for norm in ("neck.1", "neck.3"):
        table |= {f"{norm}.{leaf}": keep(f"{norm}.{leaf}") for leaf in ("weight", "bias")}
    return table


def _matrix(kernel: Array) -> Array:
    """A convolution with a kernel of one cell as a linear: [out, in, 1, 1] -> [in, out]."""
    return np.asarray(kernel.reshape(kernel.shape[:2]).T)


def _layer() -> dict[str, Recipe]:
    table = {
        "attention.relative.rows": keep("attn.rel_pos_h"),
        "attention.relative.columns": keep("attn.rel_pos_w"),
    }
    for number, name in enumerate("qkv"):
        for leaf in ("weight", "bias"):
            table[f"attention.{name}.{leaf}"] = part(f"attn.qkv.{leaf}", number, 3)
    for ours, theirs in {"attention.out": "attn.proj", "mlp.up": "mlp.lin1",
                         "mlp.down": "mlp.lin2"}.items():  # fmt: skip
        table[f"{ours}.weight"] = flip(f"{theirs}.weight")
        table[f"{ours}.bias"] = keep(f"{theirs}.bias")
    for norm in ("norm1", "norm2"):
        table |= {f"{norm}.{leaf}": keep(f"{norm}.{leaf}") for leaf in ("weight", "bias")}
    return table


_LAYER: Mapping[str, Recipe] = _layer()


def unused(c: Config) -> tuple[str, ...]:
    """Nothing."""
    return ()


def tiny() -> Config:
    """A small instance for tests: windows that do not fit the map, and one block over all of it."""
    return Config(
        hidden_size=24,
        num_layers=2,
        num_heads=3,
        intermediate_size=56,
        patch_size=4,
        image_size=28,
        window=3,
        global_blocks=(1,),
        output_size=16,
    )
