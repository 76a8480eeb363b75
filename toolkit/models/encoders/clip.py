"""CLIP's vision transformer (Radford et al., arXiv 2103.00020): pre-norm blocks, learned positions.

Also the plain-CLIP towers of MLCD, DFN5B and LAION, which differ in sizes and activation only.
Tensor names on disk are those of Hugging Face's CLIPVisionModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgevlm.toolkit.models import vit
from edgevlm.toolkit.models.recipes import Recipe, keep
from edgevlm.toolkit.models.taps import depth_needed, resolve_taps
from edgevlm.toolkit.ops.vocabulary import Ops, T, Weights
from edgevlm.toolkit.strict import Reader

MODEL_TYPES = ("clip_vision_model", "clip")


@dataclass(frozen=True)
class Config(vit.SquareImages):
    """`taps` are hidden states counted from 0 = after the first norm; each gives one output."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    taps: tuple[int, ...] = (-2,)
    class_token: bool = False

    @classmethod
    def read(cls, r: Reader, taps: tuple[int, ...], class_token: bool) -> Config:
        """From a CLIPVisionConfig; `taps` as in hidden_states[...], negative from the end."""
        r.ignore("tower")
        config = cls(
            **vit.read(r, ["quick_gelu", "gelu"], patch_size=32, eps=1e-5),
            image_size=r.count("image_size", 224),
            intermediate_size=r.count("intermediate_size", 3072),
            class_token=class_token,
        )
        return resolve_taps(config, taps, r.where)

    @property
    def tokens(self) -> int:
        """Tokens per image and output."""
        return self.patches + self.class_token


def forward(op: Ops[T], c: Config, w: Weights[T], pixels: T) -> tuple[T, ...]:
    """pixels [B, 3, image, image] -> for each tap [B, tokens, hidden_size]."""
    x = op.prepend(vit.patches(op, w, pixels, c.hidden_size, c.patch_size), w["class_token"])
    x = op.layer_norm(op.add(x, w["position"]), w / "norm_pre", c.eps)
    first = 0 if c.class_token else 1
    return tuple(op.slice(x, 1, first, None) for x in vit.run(op, c, w, x))


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors, those that the taps need."""
    d = c.hidden_size
    tensors: vit.Shapes = {
        "class_token": (d,),
        "patch.weight": (d, 3, c.patch_size, c.patch_size),
        "position": (c.patches + 1, d),
    }
    blocks = vit.block_shapes(c, depth_needed(c.taps))
    return tensors | vit.norm_shapes("norm_pre", hidden_size=d) | blocks


def names(c: Config) -> Mapping[str, Recipe]:
    """Where each of our tensors stands in a CLIPVisionModel file (without `vision_model.`)."""
    table = {
        "class_token": keep("embeddings.class_embedding"),
        "patch.weight": keep("embeddings.patch_embedding.weight"),
        "position": keep("embeddings.position_embedding.weight"),
        "norm_pre.weight": keep("pre_layrnorm.weight"),
        "norm_pre.bias": keep("pre_layrnorm.bias"),
    }
    return table | vit.clip_block_names(depth_needed(c.taps))


def unused(c: Config) -> tuple[str, ...]:
    """Globs of tensors a complete tower has and these taps never read."""
    return vit.clip_unused(c.taps, c.num_layers)


# -- the tower by itself: one embedding per image, taps play no part ---------------------------


POOLINGS = ("class",)


def embed(op: Ops[T], c: Config, w: Weights[T], pixels: T, pooling: str = "class") -> T:
    """pixels [B, 3, image, image] -> [B, hidden_size]: the pooled output of a CLIPVisionModel.

    It is the class token behind the last block and `post_layernorm`, not normalised to length 1.
    """
    (x,) = forward(op, _whole(c), w, pixels)
    return vit.pooled(op, c, w, x)


def embed_shapes(c: Config, pooling: str = "class") -> dict[str, tuple[int, ...]]:
    """Our tensors, those that `embed` needs."""
    return shapes(_whole(c)) | vit.norm_shapes("norm_post", hidden_size=c.hidden_size)


def embed_names(c: Config, pooling: str = "class") -> Mapping[str, Recipe]:
    """Where the tensors of `embed` stand in a CLIPVisionModel file (without `vision_model.`)."""
    return {**names(_whole(c)), **vit.clip_pooled_names()}


def embed_unused(c: Config, pooling: str = "class") -> tuple[str, ...]:
    """What else a tower's file may hold."""
    return ("embeddings.position_ids",)


def _whole(c: Config) -> Config:
    return replace(c, taps=(c.num_layers,), class_token=True)


def tiny() -> Config:
    """A small instance for tests."""
    return Config(
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        intermediate_size=64,
        patch_size=7,
        image_size=28,
        taps=(2,),
    )
