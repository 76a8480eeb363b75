"""CLIP's vision transformer (Radford et al., arXiv 2103.00020): pre-norm blocks, learned positions.

Also the plain-CLIP towers of MLCD, DFN5B and LAION, which differ in sizes and activation only.
Tensor names on disk are those of Hugging Face's CLIPVisionModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.models.taps import depth_needed, resolve_taps
from toolkit.ops import Ops, T, Weights
from toolkit.strict import Reader
from toolkit.weights import Recipe, flip, keep

MODEL_TYPES = ("clip_vision_model", "clip")


@dataclass(frozen=True)
class Config:
    """`taps` are hidden states counted from 0 = after the first norm; each gives one output."""

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    image: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    taps: tuple[int, ...] = (-2,)
    class_token: bool = False

    @classmethod
    def read(cls, r: Reader, taps: tuple[int, ...] = (-2,), class_token: bool = False) -> Config:
        """From a CLIPVisionConfig; `taps` as in hidden_states[...], negative from the end."""
        r.skip("projection_dim", "dropout")
        r.choice("num_channels", [3], 3)
        config = cls(
            width=r.take("hidden_size", int, 768),
            depth=r.take("num_hidden_layers", int, 12),
            heads=r.take("num_attention_heads", int, 12),
            mlp=r.take("intermediate_size", int, 3072),
            patch=r.take("patch_size", int, 32),
            image=r.take("image_size", int, 224),
            activation=r.choice("hidden_act", ["quick_gelu", "gelu"], "quick_gelu"),
            eps=r.take("layer_norm_eps", float, 1e-5),
            class_token=class_token,
        )
        return resolve_taps(config, taps, r.where)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the picture, in pixels."""
        return self.image, self.image

    @property
    def tokens(self) -> int:
        """Tokens per picture and output."""
        return (self.image // self.patch) ** 2 + self.class_token

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each output."""
        return (self.width,) * len(self.taps)


def forward(op: Ops[T], c: Config, w: Weights[T], pixels: T) -> tuple[T, ...]:
    """pixels [B, 3, image, image] -> for each tap [B, tokens, width]."""
    grid = op.conv(pixels, w / "patch", stride=c.patch)
    x = op.transpose(op.reshape(grid, (0, c.width, -1)), (0, 2, 1))
    x = op.add(op.prepend(x, w["class_token"]), w["position"])
    x = op.layer_norm(x, w / "norm_pre", c.eps)
    hidden, last = {0: x}, depth_needed(c.taps)
    if last > 0:
        n = op.layer_norm(x, w / "layers.0" / "norm1", c.eps)
    for i in range(last):
        layer = w / f"layers.{i}"
        n, x = op.add_norm(
            _attention(op, c, layer / "attention", n), x, layer / "norm2", c.eps, "layer"
        )
        update = _mlp(op, c, layer / "mlp", n)
        if i + 1 < last:
            n, x = op.add_norm(update, x, w / f"layers.{i + 1}" / "norm1", c.eps, "layer")
        else:
            x = op.add(update, x)
        hidden[i + 1] = x
    first = 0 if c.class_token else 1
    return tuple(op.slice(hidden[tap], 1, first, None) for tap in c.taps)


def _attention(op: Ops[T], c: Config, w: Weights[T], x: T) -> T:
    q, k, v = (op.linear(x, w / name) for name in ("q", "k", "v"))
    return op.linear(op.attention(q, k, v, heads=c.heads, kv_heads=c.heads), w / "out")


def _mlp(op: Ops[T], c: Config, w: Weights[T], x: T) -> T:
    up = op.linear(x, w / "up")
    return op.linear(op.gelu(up) if c.activation == "gelu" else op.quick_gelu(up), w / "down")


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors, those that the taps need."""
    d, m = c.width, c.mlp
    found: dict[str, tuple[int, ...]] = {
        "class_token": (d,),
        "patch.weight": (d, 3, c.patch, c.patch),
        "position": ((c.image // c.patch) ** 2 + 1, d),
        "norm_pre.weight": (d,),
        "norm_pre.bias": (d,),
    }
    for i in range(depth_needed(c.taps)):
        linears = {
            "attention.q": (d, d),
            "attention.k": (d, d),
            "attention.v": (d, d),
            "attention.out": (d, d),
            "mlp.up": (d, m),
            "mlp.down": (m, d),
        }
        for name, shape in linears.items():
            found[f"layers.{i}.{name}.weight"] = shape
            found[f"layers.{i}.{name}.bias"] = shape[1:]
        for norm in ("norm1", "norm2"):
            found |= {f"layers.{i}.{norm}.weight": (d,), f"layers.{i}.{norm}.bias": (d,)}
    return found


_LAYER = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
}


def names(c: Config) -> Mapping[str, Recipe]:
    """Where each of our tensors stands in a CLIPVisionModel file (without `vision_model.`)."""
    table = {
        "class_token": keep("embeddings.class_embedding"),
        "patch.weight": keep("embeddings.patch_embedding.weight"),
        "position": keep("embeddings.position_embedding.weight"),
        "norm_pre.weight": keep("pre_layrnorm.weight"),
        "norm_pre.bias": keep("pre_layrnorm.bias"),
    }
    for i in range(depth_needed(c.taps)):
        for ours, theirs in _LAYER.items():
            source = f"encoder.layers.{i}.{theirs}"
            change = keep if ours.startswith("norm") else flip
            table[f"layers.{i}.{ours}.weight"] = change(f"{source}.weight")
            table[f"layers.{i}.{ours}.bias"] = keep(f"{source}.bias")
    return table


def unused(c: Config) -> tuple[str, ...]:
    """Globs of tensors a complete tower has and these taps never read."""
    pruned = range(depth_needed(c.taps), c.depth)
    return (
        "post_layernorm.*",
        "embeddings.position_ids",
        *(f"encoder.layers.{i}.*" for i in pruned),
    )


def tiny() -> Config:
    """A small instance for tests."""
    return Config(width=32, depth=3, heads=4, mlp=64, patch=7, image=28, taps=(2,))
