"""DINOv2's vision transformer (Oquab et al., arXiv 2304.07193), with or without registers.

Blocks with layer scale; the giant's MLP is SwiGLU. Positions are stored for one grid and resized
to another when the tower is exported. Names of Hugging Face's Dinov2Model (WithRegisters).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgevlm.toolkit.images.resize import bicubic
from edgevlm.toolkit.models import vit
from edgevlm.toolkit.models.recipes import Recipe, first, flat, flip, keep, part
from edgevlm.toolkit.models.taps import depth_needed, resolve_taps
from edgevlm.toolkit.ops.vocabulary import Array, Ops, T, Weights
from edgevlm.toolkit.strict import Reader

MODEL_TYPES = ("dinov2", "dinov2_with_registers")


@dataclass(frozen=True)
class Config(vit.SquareImages):
    """image_size: side of the images it will see; trained_image_size: what its positions fit."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    trained_image_size: int
    num_registers: int = 0
    swiglu: bool = False
    qkv_bias: bool = True
    activation: str = "gelu"
    eps: float = 1e-6
    taps: tuple[int, ...] = (-1,)
    class_token: bool = False

    @classmethod
    def read(
        cls, r: Reader, taps: tuple[int, ...], class_token: bool, image_size: int | None = None
    ) -> Config:
        """From a Dinov2Config; `image_size`: side of the images, if it differs from the trained.

        hidden_states[0] are the embeddings; there is no final norm on any of them.
        """
        r.ignore("dinov2")
        swiglu, ratio = r.take("use_swiglu_ffn", bool, False), r.take("mlp_ratio", float, 4.0)
        fields = vit.read(r, ["gelu"], patch_size=14, eps=1e-6)
        stored, hidden = r.count("image_size", 224), int(fields["hidden_size"] * ratio)
        config = cls(
            **fields,
            image_size=image_size or stored,
            intermediate_size=(int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden,
            trained_image_size=stored,
            num_registers=r.take("num_register_tokens", int, 0),
            swiglu=swiglu,
            qkv_bias=r.take("qkv_bias", bool, True),
            class_token=class_token,
        )
        return resolve_taps(config, taps, r.where)

    @property
    def tokens(self) -> int:
        """Tokens per image and output: patches, with the class token if kept."""
        return self.patches + self.class_token


def forward(op: Ops[T], c: Config, w: Weights[T], pixels: T) -> tuple[T, ...]:
    """pixels [B, 3, image, image] -> for each tap [B, tokens, hidden_size], registers dropped."""
    x = op.prepend(vit.patches(op, w, pixels, c.hidden_size, c.patch_size), w["class_token"])
    x = op.add(x, w["position"])
    if c.num_registers:
        patches = op.prepend(op.slice(x, 1, 1, None), w["registers"])
        x = op.concat([op.slice(x, 1, 0, 1), patches], 1)
    feed_forward = _swiglu if c.swiglu else vit.mlp
    hidden = vit.run(op, c, w, x, feed_forward=feed_forward, scaled=True)
    return tuple(_chosen(op, c, x) for x in hidden)


def _chosen(op: Ops[T], c: Config, x: T) -> T:
    patches = op.slice(x, 1, 1 + c.num_registers, None)
    return op.concat([op.slice(x, 1, 0, 1), patches], 1) if c.class_token else patches


def _swiglu(op: Ops[Any], c: Any, w: Weights[Any], x: Any) -> Any:
    gated = op.swiglu(op.linear(x, w / "gate"), op.linear(x, w / "up"))
    return op.linear(gated, w / "down")


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors, those that the taps need; positions for the images it will see."""
    d = c.hidden_size
    tensors: vit.Shapes = {
        "class_token": (d,),
        "patch.weight": (d, 3, c.patch_size, c.patch_size),
        "patch.bias": (d,),
        "position": (c.patches + 1, d),
    }
    if c.num_registers:
        tensors["registers"] = (c.num_registers, d)
    tensors |= vit.block_shapes(c, depth_needed(c.taps))
    for i in range(depth_needed(c.taps)):
        tensors |= {f"layers.{i}.scale1": (d,), f"layers.{i}.scale2": (d,)}
        if c.swiglu:
            tensors |= vit.linear_shapes({f"layers.{i}.mlp.gate": (d, c.intermediate_size)})
        if not c.qkv_bias:
            for name in "qkv":
                del tensors[f"layers.{i}.attention.{name}.bias"]
    return tensors


_LAYER = {
    "attention.q": "attention.attention.query",
    "attention.k": "attention.attention.key",
    "attention.v": "attention.attention.value",
    "attention.out": "attention.output.dense",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "norm1": "norm1",
    "norm2": "norm2",
    "scale1": "layer_scale1.lambda1",
    "scale2": "layer_scale2.lambda1",
}


def names(c: Config) -> Mapping[str, Recipe]:
    """Where each of our tensors stands in a Dinov2Model file."""
    fixed = {
        "class_token": flat("embeddings.cls_token"),
        "registers": first("embeddings.register_tokens"),
        "position": _position_recipe(c),
        "patch.weight": keep("embeddings.patch_embeddings.projection.weight"),
        "patch.bias": keep("embeddings.patch_embeddings.projection.bias"),
    }
    return {key: fixed.get(key) or _layer_recipe(c, key) for key in shapes(c)}


def _layer_recipe(c: Config, key: str) -> Recipe:
    _, layer, name = key.split(".", 2)
    source = f"encoder.layer.{layer}"
    if name.startswith("scale"):
        return keep(f"{source}.{_LAYER[name]}")
    module, _, leaf = name.rpartition(".")
    if c.swiglu and module in ("mlp.gate", "mlp.up"):
        half = 0 if module == "mlp.gate" else 1
        return part(f"{source}.mlp.weights_in.{leaf}", half, 2)
    theirs = "mlp.weights_out" if c.swiglu and module == "mlp.down" else _LAYER[module]
    plain = leaf == "bias" or module.startswith("norm")
    return (keep if plain else flip)(f"{source}.{theirs}.{leaf}")


def _position_recipe(c: Config) -> Recipe:
    """Positions for the images it will see; they can be put back where they were not resized."""
    resized = c.image_size // c.patch_size != c.trained_image_size // c.patch_size
    stored = first("embeddings.position_embeddings")
    return replace(stored, make=lambda x: positions(c, x), undo=None if resized else stored.undo)


def positions(c: Config, stored: Array) -> Array:
    """Stored positions [1, 1 + n^2, width] as [1 + m^2, width] for the images it will see.

    Bicubic as transformers resizes; the registers variant smooths when it shrinks.
    """
    table: Array = stored[0].astype(np.float32)
    grid = c.image_size // c.patch_size
    side = math.isqrt(table.shape[0] - 1)
    if side == grid:
        return table
    square = table[1:].reshape(side, side, -1)
    resized = bicubic(square, (grid, grid), antialias=c.num_registers > 0)
    return np.concatenate([table[:1], resized.reshape(grid * grid, -1)])


def unused(c: Config) -> tuple[str, ...]:
    """Globs of tensors a complete tower has and these taps never read."""
    pruned = (f"encoder.layer.{i}.*" for i in range(depth_needed(c.taps), c.num_layers))
    return ("layernorm.*", "embeddings.mask_token", *pruned)


# -- the tower by itself: one embedding per image, taps play no part ---------------------------

POOLINGS = ("class", "mean", "class+mean")


def embed(op: Ops[T], c: Config, w: Weights[T], pixels: T, pooling: str = "class") -> T:
    """pixels [B, 3, image, image] -> [B, hidden_size], or twice as many channels for class+mean.

    Of all tokens behind the final norm the class token (a Dinov2Model's pooled output), the mean
    of the patches, or both, as Dinov2ForImageClassification joins them.
    """
    (x,) = forward(op, _whole(c), w, pixels)
    if pooling == "class":
        return vit.pooled(op, c, w, x)
    x = op.layer_norm(x, w / "norm_post", c.eps)
    mean = op.reshape(op.mean(op.slice(x, 1, 1, None), (1,)), (0, c.hidden_size))
    token = op.reshape(op.slice(x, 1, 0, 1), (0, c.hidden_size))
    return mean if pooling == "mean" else op.concat([token, mean], 1)


def embed_shapes(c: Config, pooling: str = "class") -> dict[str, tuple[int, ...]]:
    """Our tensors, those that `embed` needs."""
    return shapes(_whole(c)) | vit.norm_shapes("norm_post", hidden_size=c.hidden_size)


def embed_names(c: Config, pooling: str = "class") -> Mapping[str, Recipe]:
    """Where the tensors of `embed` stand in a Dinov2Model file."""
    norm = {f"norm_post.{leaf}": keep(f"layernorm.{leaf}") for leaf in ("weight", "bias")}
    return {**names(_whole(c)), **norm}


def embed_unused(c: Config, pooling: str = "class") -> tuple[str, ...]:
    """The token that stood for hidden patches in training."""
    return ("embeddings.mask_token",)


def _whole(c: Config) -> Config:
    return replace(c, taps=(c.num_layers,), class_token=True)


def tiny() -> Config:
    """A small instance for tests: registers, SwiGLU, several levels, another image size."""
    return Config(
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        intermediate_size=48,
        patch_size=7,
        image_size=28,
        trained_image_size=35,
        num_registers=2,
        swiglu=True,
        taps=(1, 3),
    )
