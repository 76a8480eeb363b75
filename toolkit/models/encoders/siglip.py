"""SigLIP's vision transformer (Zhai et al., arXiv 2303.15343): no class token, tanh GELU.

Tensor names on disk are those of Hugging Face's SiglipVisionModel; its pooling head is used by
`embed` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.models import vit
from edgevlm.toolkit.models.recipes import Recipe, flat, flip, keep, part
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
        """From a SiglipVisionConfig. There is no class token, whatever class_token says. Raises
        ConfigError.
        """
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


# -- the tower by itself: one embedding per image, taps play no part ---------------------------

POOLINGS = ("attention", "mean")


def embed(op: Ops[T], c: Config, w: Weights[T], pixels: T, pooling: str = "attention") -> T:
    """pixels [B, 3, image, image] -> [B, hidden_size], from the tokens behind the last norm.

    attention: the head's learned probe attends to them, a SiglipVisionModel's pooled output; mean:
    their mean, for towers without that head.
    """
    (x,) = forward(op, _whole(c), w, pixels)
    x = op.layer_norm(x, w / "norm_post", c.eps)
    if pooling == "mean":
        return op.reshape(op.mean(x, (1,)), (0, c.hidden_size))
    head = w / "head"
    probe = op.slice(op.prepend(x, head["probe"]), 1, 0, 1)  # one for each image
    found = vit.attention(op, c, head / "attention", probe, x)
    update = vit.mlp(op, c, head / "mlp", op.layer_norm(found, head / "norm", c.eps))
    return op.reshape(op.add(update, found), (0, c.hidden_size))


def embed_shapes(c: Config, pooling: str = "attention") -> dict[str, tuple[int, ...]]:
    """Our tensors, those that `embed` needs."""
    d = c.hidden_size
    tensors = shapes(_whole(c)) | vit.norm_shapes("norm_post", hidden_size=d)
    if pooling == "mean":
        return tensors
    sizes = {f"head.attention.{name}": (d, d) for name in ("q", "k", "v", "out")}
    sizes |= {"head.mlp.up": (d, c.intermediate_size), "head.mlp.down": (c.intermediate_size, d)}
    tensors |= vit.linear_shapes(sizes) | vit.norm_shapes("head.norm", hidden_size=d)
    return tensors | {"head.probe": (d,)}


def embed_names(c: Config, pooling: str = "attention") -> Mapping[str, Recipe]:
    """Where the tensors of `embed` stand in a SiglipVisionModel file (without `vision_model.`)."""
    table = {**names(_whole(c)), **vit.clip_pooled_names()}
    if pooling == "mean":
        return table
    table["head.probe"] = flat("head.probe")
    for leaf in ("weight", "bias"):
        for number, name in enumerate("qkv"):
            joined = part(f"head.attention.in_proj_{leaf}", number, 3)
            table[f"head.attention.{name}.{leaf}"] = joined
        table[f"head.norm.{leaf}"] = keep(f"head.layernorm.{leaf}")
    linears = {"attention.out": "attention.out_proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    for ours, theirs in linears.items():
        table[f"head.{ours}.weight"] = flip(f"head.{theirs}.weight")
        table[f"head.{ours}.bias"] = keep(f"head.{theirs}.bias")
    return table


def embed_unused(c: Config, pooling: str = "attention") -> tuple[str, ...]:
    """The head where the mean was asked for."""
    return ("embeddings.position_ids", *(("head.*",) if pooling == "mean" else ()))


def _whole(c: Config) -> Config:
    return replace(c, taps=(c.num_layers,))


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
