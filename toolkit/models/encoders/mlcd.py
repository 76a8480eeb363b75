"""MLCD's vision transformer (An et al., arXiv 2407.17331): a CLIP ViT with rotary positions.

Every head rotates q and k by angles of the patch's row and column (RoPE2D); the class token has a
learned angle. Source: deepglint/unicom; names of Hugging Face's MLCDVisionModel or native ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from edgevlm.toolkit.models import vit
from edgevlm.toolkit.models.recipes import Recipe, flat, flip, keep, part
from edgevlm.toolkit.models.taps import depth_needed, resolve_taps
from edgevlm.toolkit.ops.vocabulary import Array, Ops, T, Weights, read_only
from edgevlm.toolkit.strict import Reader

MODEL_TYPES = ("mlcd_vision_model",)


@dataclass(frozen=True)
class Config:
    """taps: hidden states counted from 0 = after the first norm. image_size: (height, width)."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    image_size: tuple[int, int]
    activation: str = "gelu"
    eps: float = 1e-5
    theta: float = 10000.0
    taps: tuple[int, ...] = (-2,)
    class_token: bool = False

    @classmethod
    def read(cls, r: Reader, taps: tuple[int, ...], class_token: bool) -> Config:
        """From an MLCDVisionConfig."""
        r.ignore("tower")
        r.skip("rope_parameters")
        r.choice("num_key_value_groups", [1], 1)
        rope = r.sub("rope_parameters") if r.has("rope_parameters") else Reader({}, r.where)
        fields = vit.read(
            r,
            ["gelu", "quick_gelu"],
            hidden_size=1664,
            num_layers=48,
            num_heads=16,
            patch_size=14,
            eps=1e-5,
        )
        side = r.count("image_size", 336)
        config = cls(
            **fields,
            image_size=(side, side),
            intermediate_size=r.count("intermediate_size", 8192),
            theta=rope.positive("rope_theta", 10000.0),
            class_token=class_token,
        )
        return resolve_taps(config, taps, r.where)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the image, in pixels."""
        return self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens per image and output."""
        return self.grid[0] * self.grid[1] + self.class_token

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Channels of each output."""
        return (self.hidden_size,) * len(self.taps)


def forward(op: Ops[T], c: Config, w: Weights[T], pixels: T) -> tuple[T, ...]:
    """pixels [B, 3, height, width] -> for each tap [B, tokens, hidden_size]."""
    x = op.prepend(vit.patches(op, w, pixels, c.hidden_size, c.patch_size), w["class_token"])
    x = op.layer_norm(x, w / "norm_pre", c.eps)
    patch_table = op.constant("rotary.angles", patch_angles(c))
    class_angle = op.to_float32(op.reshape(w["class_angle"], (1, -1)))
    angles = op.concat([class_angle, patch_table], 0)

    def attend(op: Ops[Any], c: Any, w: Weights[Any], x: Any) -> Any:
        q, k, v = (op.linear(x, w / name) for name in ("q", "k", "v"))
        mixed = op.attention_rotary(
            q, k, v, angles, num_heads=c.num_heads, head_dim=c.hidden_size // c.num_heads
        )
        return op.linear(mixed, w / "out")

    first = 0 if c.class_token else 1
    return tuple(op.slice(x, 1, first, None) for x in vit.run(op, c, w, x, attend))


@lru_cache(maxsize=8)
def patch_angles(c: Config) -> Array:
    """[rows * columns, head_dim / 2] float32: row * f_k for half of k, then column * f_k.

    f_k = theta^(-2k / m), m = head_dim / 2, k below m / 2. Rows and columns count from 0.
    The array is read-only.
    """
    half = c.hidden_size // c.num_heads // 2
    frequencies = 1.0 / c.theta ** (np.arange(0, half, 2, dtype=np.float32) / np.float32(half))
    rows, columns = np.divmod(np.arange(c.grid[0] * c.grid[1]), c.grid[1])
    angles = [np.outer(index.astype(np.float32), frequencies) for index in (rows, columns)]
    return read_only(np.concatenate(angles, 1).astype(np.float32))


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors, those that the taps need."""
    tensors: vit.Shapes = {
        "class_token": (c.hidden_size,),
        "class_angle": (c.hidden_size // c.num_heads // 2,),
        "patch.weight": (c.hidden_size, 3, c.patch_size, c.patch_size),
    }
    blocks = vit.block_shapes(c, depth_needed(c.taps))
    return tensors | vit.norm_shapes("norm_pre", hidden_size=c.hidden_size) | blocks


def names(c: Config) -> Mapping[str, Recipe]:
    """Where each of our tensors stands in an MLCDVisionModel file (without `vision_model.`)."""
    table = {
        "class_token": keep("embeddings.class_embedding"),
        "class_angle": flat("class_pos_emb"),
        "patch.weight": keep("embeddings.patch_embedding.weight"),
        "norm_pre.weight": keep("pre_layrnorm.weight"),
        "norm_pre.bias": keep("pre_layrnorm.bias"),
    }
    return table | vit.clip_block_names(depth_needed(c.taps))


def native_names(c: Config) -> Mapping[str, Recipe]:
    """Where they stand in the native file, which joins q, k and v in one matrix."""
    table = {
        "class_token": keep("class_embedding"),
        "class_angle": flat("class_pos_emb"),
        "patch.weight": keep("conv1.weight"),
        "norm_pre.weight": keep("ln_pre.weight"),
        "norm_pre.bias": keep("ln_pre.bias"),
    }
    fixed = {"attention.out": "attn.out_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for i in range(depth_needed(c.taps)):
        block, ours = f"transformer.resblocks.{i}", f"layers.{i}"
        for number, name in enumerate("qkv"):
            for leaf in ("weight", "bias"):
                joined = part(f"{block}.attn.in_proj.{leaf}", number, 3)
                table[f"{ours}.attention.{name}.{leaf}"] = joined
        for name, theirs in fixed.items():
            table[f"{ours}.{name}.weight"] = flip(f"{block}.{theirs}.weight")
            table[f"{ours}.{name}.bias"] = keep(f"{block}.{theirs}.bias")
        for number in (1, 2):
            for leaf in ("weight", "bias"):
                table[f"{ours}.norm{number}.{leaf}"] = keep(f"{block}.ln_{number}.{leaf}")
    return table


def unused(c: Config) -> tuple[str, ...]:
    """Globs of tensors a complete tower has and these taps never read."""
    return vit.clip_unused(c.taps, c.num_layers)


# -- the tower by itself: one embedding per image, taps play no part ---------------------------


POOLINGS = ("class",)


def embed(op: Ops[T], c: Config, w: Weights[T], pixels: T, pooling: str = "class") -> T:
    """pixels [B, 3, height, width] -> [B, hidden_size]: the pooled output of an MLCDVisionModel.

    It is the class token behind the last block and `post_layernorm`, not normalised to length 1.
    """
    (x,) = forward(op, _whole(c), w, pixels)
    return vit.pooled(op, c, w, x)


def embed_shapes(c: Config, pooling: str = "class") -> dict[str, tuple[int, ...]]:
    """Our tensors, those that `embed` needs."""
    return shapes(_whole(c)) | vit.norm_shapes("norm_post", hidden_size=c.hidden_size)


def embed_names(c: Config, pooling: str = "class") -> Mapping[str, Recipe]:
    """Where the tensors of `embed` stand in an MLCDVisionModel file (without `vision_model.`)."""
    return {**names(_whole(c)), **vit.clip_pooled_names()}


def native_embed_names(c: Config) -> Mapping[str, Recipe]:
    """Where they stand in the native file."""
    norm = {f"norm_post.{leaf}": keep(f"ln_post.{leaf}") for leaf in ("weight", "bias")}
    return {**native_names(_whole(c)), **norm}


def embed_unused(c: Config, pooling: str = "class") -> tuple[str, ...]:
    """What else a tower's file may hold."""
    return ("embeddings.position_ids",)


def _whole(c: Config) -> Config:
    return replace(c, taps=(c.num_layers,), class_token=True)


def tiny() -> Config:
    """A small instance for tests: not square."""
    return Config(
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        intermediate_size=72,
        patch_size=7,
        image_size=(21, 35),
        taps=(2,),
    )
