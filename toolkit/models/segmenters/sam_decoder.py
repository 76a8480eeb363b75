"""MLCD-Seg's way from a [SEG] token to a mask: a projection, then SAM's mask decoder.

The language model's state at the token, projected, is the only sparse prompt of SAM's decoder
(Kirillov et al., arXiv 2304.02643; the projection in deepglint/unicom, mlcd_vl/downstream). Two
transformer layers exchange six tokens and the image's map; the first of four masks is the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgevlm.toolkit.models.recipes import Recipe, flip, keep
from edgevlm.toolkit.models.vit import linear_shapes, norm_shapes
from edgevlm.toolkit.ops.vocabulary import Array, Ops, T, Weights

NUM_HEADS = 8  # not in any tensor's shape
_EPS, _MAP_EPS = 1e-5, 1e-6  # of the transformer's norms, and of that over a map's channels
_CROSS = ("cross_tokens", "cross_image")
_HYPER_LAYERS = 3


@dataclass(frozen=True)
class Config:
    """hidden_size: of the language model's states; projection_size: between the projection's two
    linears; width: channels of map and tokens; grid: cells of the map's side; inner_size: channels
    of attention between tokens and map; up_sizes: channels of the map at twice and four times its
    side.
    """

    hidden_size: int
    projection_size: int
    width: int
    grid: int
    num_layers: int
    intermediate_size: int
    inner_size: int
    up_sizes: tuple[int, int]
    hyper_size: int
    num_masks: int = 4
    num_heads: int = NUM_HEADS

    @property
    def tokens(self) -> int:
        """Cells of the map."""
        return self.grid**2

    @property
    def side(self) -> int:
        """Height and width of a mask."""
        return 4 * self.grid


def forward(op: Ops[T], c: Config, w: Weights[T], hidden: T, features: T) -> T:
    """Logits [N, side, side] of one mask for each state.

    hidden [N, hidden_size]: states of the tokens; features [N, tokens, width]: of each one's image.
    """
    projection = w / "projection"
    prompt = op.linear(op.gelu(op.linear(hidden, projection / "0")), projection / "1")
    own = op.reshape(prompt, (0, 1, c.width))
    initial = op.prepend(op.prepend(own, w["mask_tokens"]), w["score_token"])
    tokens, image = initial, op.add(features, w["no_mask"])
    for i in range(c.num_layers):
        layer = w / f"layers.{i}"
        tokens, image = op.block(_layer, layer, tokens, image, initial, w["position"], c, i == 0)
    tokens = _attended(op, c, w / "final", tokens, image, initial, w["position"], "norm")
    chosen = op.reshape(op.slice(tokens, 1, 1, 2), (0, c.width))
    for i in range(_HYPER_LAYERS):
        chosen = op.linear(op.relu(chosen) if i else chosen, w / "hyper" / str(i))
    return _mask(op, c, _upscaled(op, c, w / "upscaling", image), chosen)


def _layer(
    op: Ops[T],
    w: Weights[T],
    tokens: T,
    image: T,
    initial: T,
    position: T,
    c: Config,
    first: bool,
) -> tuple[T, T]:
    """Tokens attend to one another, to the image, go through an MLP; then the image to tokens.

    In the first layer the tokens have no positions yet, and are replaced, not added to.
    """
    placed = tokens if first else op.add(tokens, initial)
    mixed = _attention(op, c, w / "self", placed, placed, tokens)
    tokens = op.layer_norm(mixed if first else op.add(tokens, mixed), w / "norm1", _EPS)
    tokens = _attended(op, c, w, tokens, image, initial, position, "norm2", "cross_tokens")
    mlp = w / "mlp"
    grown = op.linear(op.relu(op.linear(tokens, mlp / "up")), mlp / "down")
    tokens = op.layer_norm(op.add(tokens, grown), w / "norm3", _EPS)
    placed, cells = op.add(tokens, initial), op.add(image, position)
    seen = _attention(op, c, w / "cross_image", cells, placed, tokens)
    return tokens, op.layer_norm(op.add(image, seen), w / "norm4", _EPS)


def _attended(
    op: Ops[T],
    c: Config,
    w: Weights[T],
    tokens: T,
    image: T,
    initial: T,
    position: T,
    norm: str,
    attention: str = "cross_tokens",
) -> T:
    """Tokens that have attended to the image."""
    placed, cells = op.add(tokens, initial), op.add(image, position)
    seen = _attention(op, c, w / attention, placed, cells, image)
    return op.layer_norm(op.add(tokens, seen), w / norm, _EPS)


def _attention(op: Ops[T], c: Config, w: Weights[T], q: T, k: T, v: T) -> T:
    q, k, v = (op.linear(x, w / name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    return op.linear(op.attention(q, k, v, num_heads=c.num_heads), w / "out")


def _upscaled(op: Ops[T], c: Config, w: Weights[T], x: T) -> T:
    """The map at four times its side: [N, tokens, width] -> [N, tokens, 2, 2, 2, 2, channels].

    A transposed convolution whose kernel and stride are 2 is a linear from a cell to its four
    quarters; they stay on axes of their own (row and column in the half, then in the quarter).
    """
    x = _quartered(op, w / "0", x, (0, c.tokens, 2, 2, c.up_sizes[0]))
    x = op.gelu(op.layer_norm(x, w / "norm", _MAP_EPS))
    return op.gelu(_quartered(op, w / "1", x, (0, c.tokens, 2, 2, 2, 2, c.up_sizes[1])))


def _quartered(op: Ops[T], w: Weights[T], x: T, shape: tuple[int, ...]) -> T:
    """The four quarters share a bias, which is added to each."""
    product = op.linear(x, w.holding(weight=w["weight"]))
    return op.add(op.reshape(product, shape), w["bias"])


def _mask(op: Ops[T], c: Config, x: T, chosen: T) -> T:
    """The product of every pixel with the mask token's vector, as an image."""
    flat = op.reshape(x, (0, 16 * c.tokens, c.up_sizes[1]))
    products = op.mul(flat, op.reshape(chosen, (0, 1, c.up_sizes[1])))
    mask = op.reshape(op.sum(products, (2,)), (-1, c.grid, c.grid, 2, 2, 2, 2))
    return op.reshape(op.transpose(mask, (0, 1, 3, 5, 2, 4, 6)), (-1, c.side, c.side))


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors."""
    d, (half, quarter) = c.width, c.up_sizes
    tensors: dict[str, tuple[int, ...]] = {
        "position": (c.tokens, d),
        "no_mask": (d,),
        "score_token": (1, d),
        "mask_tokens": (c.num_masks, d),
        "upscaling.0.weight": (d, 4 * half),
        "upscaling.0.bias": (half,),
        "upscaling.1.weight": (half, 4 * quarter),
        "upscaling.1.bias": (quarter,),
    }
    hyper = [d, *[c.hyper_size] * (_HYPER_LAYERS - 1), quarter]
    sizes = {f"hyper.{i}": (hyper[i], hyper[i + 1]) for i in range(_HYPER_LAYERS)}
    sizes |= {"projection.0": (c.hidden_size, c.projection_size), "projection.1":
              (c.projection_size, d)}  # fmt: skip
    tensors |= linear_shapes(sizes) | norm_shapes("upscaling.norm", hidden_size=half)
    for i in range(c.num_layers):
        layer = {"mlp.up": (d, c.intermediate_size), "mlp.down": (c.intermediate_size, d)}
        layer |= _attention_sizes("self", d, d)
        for name in _CROSS:
            layer |= _attention_sizes(name, d, c.inner_size)
        own = linear_shapes(layer)
        own |= norm_shapes("norm1", "norm2", "norm3", "norm4", hidden_size=d)
        tensors |= {f"layers.{i}.{name}": shape for name, shape in own.items()}
    final = linear_shapes(_attention_sizes("cross_tokens", d, c.inner_size))
    final |= norm_shapes("norm", hidden_size=d)
    return tensors | {f"final.{name}": shape for name, shape in final.items()}


def _attention_sizes(name: str, width: int, inner: int) -> dict[str, tuple[int, int]]:
    return {f"{name}.{part}": (width, inner) for part in "qkv"} | {f"{name}.out": (inner, width)}


_LAYER = {
    "self": "self_attn",
    "cross_tokens": "cross_attn_token_to_image",
    "cross_image": "cross_attn_image_to_token",
    "mlp.up": "mlp.lin1",
    "mlp.down": "mlp.lin2",
    **{f"norm{i}": f"norm{i}" for i in range(1, 5)},
}
_PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


def names(c: Config) -> Mapping[str, Recipe]:
    """Where each of our tensors stands in a checkpoint, below `model.`.

    The map's positions are made from the gaussian matrix; nothing trains them.
    """
    decoder, prompts = "sam.mask_decoder", "sam.prompt_encoder"
    gaussian = f"{prompts}.pe_layer.positional_encoding_gaussian_matrix"
    table = {
        "position": Recipe(
            (gaussian,),
            lambda matrix: dense_positions(matrix, c.grid),
            lambda ours, stored: (stored,),
        ),
        "no_mask": _row(f"{prompts}.no_mask_embed.weight"),
        "score_token": keep(f"{decoder}.iou_token.weight"),
        "mask_tokens": keep(f"{decoder}.mask_tokens.weight"),
    }
    for ours, theirs in {"0": "0", "norm": "1", "1": "3"}.items():
        source = f"{decoder}.output_upscaling.{theirs}"
        weight = keep if ours == "norm" else _quarters
        table[f"upscaling.{ours}.weight"] = weight(f"{source}.weight")
        table[f"upscaling.{ours}.bias"] = keep(f"{source}.bias")
    hyper = f"{decoder}.output_hypernetworks_mlps.0.layers"
    linears = {f"hyper.{i}": f"{hyper}.{i}" for i in range(_HYPER_LAYERS)}
    linears |= {"projection.0": "text2sam_projection.0", "projection.1": "text2sam_projection.2"}
    for ours, theirs in linears.items():
        table |= _linear(ours, theirs)
    for key in shapes(c):
        stem, leaf = key.rsplit(".", 1) if "." in key else (key, "")
        if stem.startswith(("layers.", "final.")):
            change = flip if leaf == "weight" and "norm" not in stem else keep
            table[key] = change(f"{decoder}.transformer.{_theirs(stem)}.{leaf}")
    return table


def _theirs(stem: str) -> str:
    """layers.0.self.q -> layers.0.self_attn.q_proj; final.norm -> norm_final_attn."""
    if stem == "final.norm":
        return "norm_final_attn"
    if stem.startswith("final."):
        return f"final_attn_token_to_image.{_PARTS[stem.rsplit('.', 1)[1]]}"
    _, layer, module = stem.split(".", 2)
    own, _, last = module.rpartition(".")
    inside = f"{_LAYER[own]}.{_PARTS[last]}" if own in _LAYER else _LAYER[module]
    return f"layers.{layer}.{inside}"


def _linear(ours: str, theirs: str) -> dict[str, Recipe]:
    return {f"{ours}.weight": flip(f"{theirs}.weight"), f"{ours}.bias": keep(f"{theirs}.bias")}


def _row(source: str) -> Recipe:
    return Recipe((source,), lambda x: x[0], lambda ours, *_: (ours[None],))


def _quarters(source: str) -> Recipe:
    """A transposed convolution's kernel [in, out, 2, 2] as a linear's [in, 4 * out]."""

    def make(kernel: Array) -> Array:
        return np.asarray(kernel.transpose(0, 2, 3, 1).reshape(kernel.shape[0], -1))

    def undo(ours: Array, stored: Array) -> tuple[Array, ...]:
        apart = ours.reshape(stored.shape[0], 2, 2, stored.shape[1])
        return (np.asarray(apart.transpose(0, 3, 1, 2)),)

    return Recipe((source,), make, undo)


def dense_positions(matrix: Array, grid: int) -> Array:
    """Positions of the map's cells [grid * grid, 2 * F], float32.

    matrix [2, F]: random frequencies (Tancik et al., arXiv 2006.10739) for x and y of a cell's
    centre in -1..1; sines first, then cosines.
    """
    centres = (np.arange(grid, dtype=np.float32) + np.float32(0.5)) / np.float32(grid)
    y, x = np.meshgrid(2 * centres - 1, 2 * centres - 1, indexing="ij")
    points = np.stack([x, y], -1).reshape(-1, 2)
    angles = np.float32(2 * np.pi) * (points @ np.asarray(matrix, np.float32))
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)


def unused(c: Config) -> tuple[str, ...]:
    """What other prompts and other masks need: points, boxes, masks, scores."""
    decoder, prompts = "sam.mask_decoder", "sam.prompt_encoder"
    return (
        f"{prompts}.point_embeddings.*",
        f"{prompts}.not_a_point_embed.weight",
        f"{prompts}.mask_downscaling.*",
        f"{decoder}.iou_prediction_head.*",
        f"{decoder}.output_hypernetworks_mlps.[1-9]*",
    )


def tiny() -> Config:
    """A small instance for tests."""
    return Config(
        hidden_size=20,
        projection_size=24,
        width=32,
        grid=5,
        num_layers=2,
        intermediate_size=40,
        inner_size=16,
        up_sizes=(8, 4),
        hyper_size=32,
    )
