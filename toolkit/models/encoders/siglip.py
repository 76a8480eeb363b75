"""SigLIP's vision transformer (Zhai et al., arXiv 2303.15343): no class token, tanh GELU.

Tensor names on disk are those of Hugging Face's SiglipVisionModel; its pooling head is not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.models import vit
from edgevlm.toolkit.models.recipes import Recipe, keep
from edgevlm.toolkit.models.taps import depth_needed, resolve_taps
from edgevlm.toolkit.ops.vocabulary import Ops, T, Weights
from edgevlm.toolkit.strict import Reader

MODEL_TYPES = ("siglip_vision_model", "siglip")


@dataclass(frozen=True)
class Config(vit.SquareImages):
    """`taps` are hidden states counted from 0 = the embeddings."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    activation: str = "gelu_pytorch_tanh"
    eps: float = 1e-6
    taps: tuple[int, ...] = (-2,)

    @classmethod
    def read(cls, r: Reader, taps: tuple[int, ...], class_token: bool) -> Config:
        """From a SiglipVisionConfig. There is no class token, whatever class_token says."""
        r.ignore("tower")
        config = cls(
            **vit.read(r, ["gelu_pytorch_tanh", "gelu"], patch_size=16, eps=1e-6),
            image_size=r.count("image_size", 224),
            intermediate_size=r.count("intermediate_size", 3072),
        )
        if config.image_size < config.patch_size:
            raise ConfigError(f"{r.where}: image_size {config.image_size} is less than one patch")
        return resolve_taps(config, taps, r.where)

    @property
    def tokens(self) -> int:
        """Tokens per image and output."""
        return self.patches


def forward(op: Ops[T], c: Config, w: Weights[T], pixels: T) -> tuple[T, ...]:
    """pixels [B, 3, image, image] -> for each tap [B, tokens, hidden_size]."""
    x = op.add(vit.patches(op, w, pixels, c.hidden_size, c.patch_size), w["position"])
    return vit.run(op, c, w, x)


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors, those that the taps need."""
    tensors: vit.Shapes = {
        "patch.weight": (c.hidden_size, 3, c.patch_size, c.patch_size),
        "patch.bias": (c.hidden_size,),
        "position": (c.tokens, c.hidden_size),
    }
    return tensors | vit.block_shapes(c, depth_needed(c.taps))


def names(c: Config) -> Mapping[str, Recipe]:
    """Where each of our tensors stands in a SiglipVisionModel file (without `vision_model.`)."""
    table = {
        "patch.weight": keep("embeddings.patch_embedding.weight"),
        "patch.bias": keep("embeddings.patch_embedding.bias"),
        "position": keep("embeddings.position_embedding.weight"),
    }
    return table | vit.clip_block_names(depth_needed(c.taps))


def unused(c: Config) -> tuple[str, ...]:
    """Globs of tensors a complete tower has and these taps never read."""
    return (*vit.clip_unused(c.taps, c.num_layers), "head.*")


def tiny() -> Config:
    """A small instance for tests."""
    return Config(
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        intermediate_size=72,
        patch_size=7,
        image_size=30,
        taps=(3, 1),
    )
