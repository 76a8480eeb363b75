"""UNICOM's vision transformer (An et al., arXiv 2304.05884): no class token, ReLU6, own head.

Source: deepglint/unicom. The head turns all tokens into one embedding; its batch norms are folded
into the linears before them. Without the head the output are the patch tokens behind the norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgevlm.toolkit.models import vit
from edgevlm.toolkit.models.recipes import Recipe, first, flip, keep, part
from edgevlm.toolkit.ops.vocabulary import Array, Ops, T, Weights

MODEL_TYPES = ("unicom",)
_BATCH_EPS = 2e-5


@dataclass(frozen=True)
class Config:
    """`embedding_dim`: length of the head's output, 0 for patch tokens."""

    hidden_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    image_size: int
    embedding_dim: int = 0
    eps: float = 1e-5
    activation: str = "relu6"

    @property
    def intermediate_size(self) -> int:
        """Channels inside the MLP."""
        return 4 * self.hidden_size

    @property
    def taps(self) -> tuple[int, ...]:
        """The last hidden state."""
        return (self.num_layers,)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the image, in pixels."""
        return self.image_size, self.image_size

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Patch tokens, or the one embedding."""
        return 1 if self.embedding_dim else self.patches

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Channels of the output."""
        return (self.embedding_dim or self.hidden_size,)


PUBLISHED = {
    "unicom-b32": Config(768, 12, 12, 32, 224, 512),
    "unicom-b16": Config(768, 12, 12, 16, 224, 768),
    "unicom-l14": Config(1024, 24, 16, 14, 224, 768),
    "unicom-l14-336": Config(1024, 24, 16, 14, 336, 768),
}


def forward(op: Ops[T], c: Config, w: Weights[T], pixels: T) -> tuple[T, ...]:
    """pixels [B, 3, image, image] -> [B, tokens, width], or the embedding as [B, 1, embedding]."""
    x = op.add(vit.patches(op, w, pixels, c.hidden_size, c.patch_size), w["position"])
    x = op.layer_norm(vit.run(op, c, w, x)[0], w / "norm", c.eps)
    if c.embedding_dim:
        joined = op.reshape(x, (0, 1, c.patches * c.hidden_size))
        x = op.linear(op.linear(joined, w / "head.0"), w / "head.1")
    return (x,)


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors; q, k and v have no biases."""
    tensors: vit.Shapes = {
        "patch.weight": (c.hidden_size, 3, c.patch_size, c.patch_size),
        "patch.bias": (c.hidden_size,),
        "position": (c.patches, c.hidden_size),
    }
    tensors |= vit.block_shapes(c, c.num_layers)
    tensors |= vit.norm_shapes("norm", hidden_size=c.hidden_size)
    for i in range(c.num_layers):
        for name in "qkv":
            del tensors[f"layers.{i}.attention.{name}.bias"]
    if c.embedding_dim:
        sizes = {
            "head.0": (c.patches * c.hidden_size, c.hidden_size),
            "head.1": (c.hidden_size, c.embedding_dim),
        }
        tensors |= vit.linear_shapes(sizes)
    return tensors


def names(c: Config) -> Mapping[str, Recipe]:
    """Where each of our tensors stands in the original's file."""
    table = {
        "patch.weight": keep("patch_embed.proj.weight"),
        "patch.bias": keep("patch_embed.proj.bias"),
        "position": first("pos_embed"),
        "norm.weight": keep("norm.weight"),
        "norm.bias": keep("norm.bias"),
    }
    linears = {"attention.out": "attn.proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    for i in range(c.num_layers):
        ours, theirs = f"layers.{i}", f"blocks.{i}"
        for number, name in enumerate("qkv"):
            joined = part(f"{theirs}.attn.qkv.weight", number, 3)
            table[f"{ours}.attention.{name}.weight"] = joined
        for name, source in linears.items():
            table[f"{ours}.{name}.weight"] = flip(f"{theirs}.{source}.weight")
            table[f"{ours}.{name}.bias"] = keep(f"{theirs}.{source}.bias")
        for norm in ("norm1", "norm2"):
            for leaf in ("weight", "bias"):
                table[f"{ours}.{norm}.{leaf}"] = keep(f"{theirs}.{norm}.{leaf}")
    if c.embedding_dim:
        for number in range(2):
            linear, batch = f"feature.{2 * number}.weight", f"feature.{2 * number + 1}"
            table |= _folded(f"head.{number}", linear, batch)
    return table


def _folded(ours: str, linear: str, norm: str) -> dict[str, Recipe]:
    """A linear without bias and the batch norm behind it as one linear."""
    leaves = ("weight", "bias", "running_mean", "running_var")
    sources = (linear, *(f"{norm}.{leaf}" for leaf in leaves))

    def weight(matrix: Array, gain: Array, shift: Array, mean: Array, var: Array) -> Array:
        return np.asarray((matrix * (gain / np.sqrt(var + _BATCH_EPS))[:, None]).T)

    def bias(matrix: Array, gain: Array, shift: Array, mean: Array, var: Array) -> Array:
        return np.asarray(shift - mean * gain / np.sqrt(var + _BATCH_EPS))

    return {f"{ours}.weight": Recipe(sources, weight), f"{ours}.bias": Recipe(sources, bias)}


def unused(c: Config) -> tuple[str, ...]:
    """The head where only tokens are needed, and batch counters."""
    return ("*.num_batches_tracked", *(() if c.embedding_dim else ("feature.*",)))


def tiny() -> Config:
    """A small instance for tests: with its head."""
    return Config(
        hidden_size=32, num_layers=2, num_heads=4, patch_size=7, image_size=21, embedding_dim=24
    )
