"""UNICOM's vision transformer (An et al., arXiv 2304.05884): no class token, ReLU6, own head.

Source: deepglint/unicom. The head turns all tokens into one embedding; its batch norms, by their
running statistics, are folded into the second linear. Without the head the output are the patch
tokens behind the norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgevlm.toolkit.errors import CheckpointError
from edgevlm.toolkit.models import vit
from edgevlm.toolkit.models.recipes import Recipe, first, flip, keep, part
from edgevlm.toolkit.ops.vocabulary import Array, Ops, T, Weights

MODEL_TYPES = ("unicom",)
_BATCH_EPS = 2e-5
_BATCH = ("weight", "bias", "running_mean", "running_var")


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


# -- the tower by itself -----------------------------------------------------------------------

POOLINGS = ("head",)


def embed(op: Ops[T], c: Config, w: Weights[T], pixels: T, pooling: str = "head") -> T:
    """pixels [B, 3, image, image] -> [B, embedding]: the head's output, not of length 1."""
    return op.reshape(forward(op, c, w, pixels)[0], (0, c.embedding_dim))


def embed_shapes(c: Config, pooling: str = "head") -> dict[str, tuple[int, ...]]:
    """Our tensors, with those of the head."""
    return shapes(c)


def embed_names(c: Config, pooling: str = "head") -> Mapping[str, Recipe]:
    """Where they stand in the original's file."""
    return names(c)


def embed_unused(c: Config, pooling: str = "head") -> tuple[str, ...]:
    """Batch counters."""
    return unused(c)


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
        tensors["head.0.weight"] = (c.patches * c.hidden_size, c.hidden_size)
        tensors |= vit.linear_shapes({"head.1": (c.hidden_size, c.embedding_dim)})
    return tensors


def stored_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the original's file by its name there, its batch counters aside."""
    d, wide = c.hidden_size, c.intermediate_size
    found: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (d, 3, c.patch_size, c.patch_size),
        "patch_embed.proj.bias": (d,),
        "pos_embed": (1, c.patches, d),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    block: dict[str, tuple[int, ...]] = {"attn.qkv.weight": (3 * d, d)}
    for name, rows, columns in (("attn.proj", d, d), ("mlp.fc1", wide, d), ("mlp.fc2", d, wide)):
        block |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    block |= {f"norm{i}.{leaf}": (d,) for i in (1, 2) for leaf in ("weight", "bias")}
    for i in range(c.num_layers):
        found |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    if c.embedding_dim:
        found |= {"feature.0.weight": (d, c.patches * d), "feature.2.weight": (c.embedding_dim, d)}
        for number, channels in ((1, d), (3, c.embedding_dim)):
            found |= {f"feature.{number}.{leaf}": (channels,) for leaf in _BATCH}
    return found


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
    return table | (_head() if c.embedding_dim else {})


def _head() -> dict[str, Recipe]:
    """The first matrix as it is: it has most of the file's values. The second takes in the rest:
    the batch norm between the two on its inputs, the one behind it on its outputs.
    """
    sources = (
        *(f"feature.1.{leaf}" for leaf in _BATCH),
        "feature.2.weight",
        *(f"feature.3.{leaf}" for leaf in _BATCH),
    )

    def weight(*stored: Array) -> Array:
        (inner, _), (outer, _) = _affine(*stored[:4]), _affine(*stored[5:])
        folded = stored[4].astype(np.float64) * inner * outer[:, None]
        return np.asarray(folded.T.astype(np.float32))

    def bias(*stored: Array) -> Array:
        (_, shift), (outer, moved) = _affine(*stored[:4]), _affine(*stored[5:])
        through = stored[4].astype(np.float64) @ shift
        return np.asarray((through * outer + moved).astype(np.float32))

    return {
        "head.0.weight": flip("feature.0.weight"),
        "head.1.weight": Recipe(sources, weight),
        "head.1.bias": Recipe(sources, bias),
    }


def _affine(gain: Array, bias: Array, mean: Array, variance: Array) -> tuple[Array, Array]:
    """A batch norm by its running statistics: what it multiplies by and adds, in float64.

    Raises CheckpointError for a variance that cannot be one.
    """
    if variance.min() < 0:
        raise CheckpointError(f"a running variance of the head is {variance.min()}, below 0")
    slope = gain.astype(np.float64) / np.sqrt(variance.astype(np.float64) + _BATCH_EPS)
    return slope, bias.astype(np.float64) - mean.astype(np.float64) * slope


def unused(c: Config) -> tuple[str, ...]:
    """The head where only tokens are needed, and batch counters."""
    return ("*.num_batches_tracked", *(() if c.embedding_dim else ("feature.*",)))


def tiny() -> Config:
    """A small instance for tests: with its head."""
    return Config(
        hidden_size=32, num_layers=2, num_heads=4, patch_size=7, image_size=21, embedding_dim=24
    )
