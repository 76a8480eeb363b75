"""ConvNeXt (Liu et al., arXiv 2201.03545) with any number of stages; ConvLLaVA adds a fifth.

Any image size: every stride floors, total stride 4 * 2^(stages - 1). The output is the last
stage without the final norm, as ConvLLaVA uses it. Names of Hugging Face's ConvNextModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.models import convnet
from edgevlm.toolkit.models.recipes import Recipe, flip, keep
from edgevlm.toolkit.ops.vocabulary import Ops, T, Weights
from edgevlm.toolkit.strict import Reader

MODEL_TYPES = ("convnext",)


@dataclass(frozen=True)
class Config:
    """scaled: blocks end with a scale per channel. image_size: side it was published for.

    final_eps: of the norm behind the last stage, which the tower by itself applies to the mean.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    patch: int = 4
    scaled: bool = True
    eps: float = 1e-6
    image_size: int = 224
    final_eps: float = 1e-12

    @classmethod
    def read(cls, r: Reader, taps: tuple[int, ...], class_token: bool) -> Config:
        """From a ConvNextConfig. Tap -1 is the last stage; -2 is it without its last block.

        layer_norm_eps concerns the final norm only; all others have 1e-6. Raises ConfigError.
        """
        r.ignore("convnext")
        r.choice("num_channels", [3], 3)
        r.choice("hidden_act", ["gelu"], "gelu", nullable=False)
        depths, dims = (tuple(r.take(key, list)) for key in ("depths", "hidden_sizes"))
        stages = r.count("num_stages", len(depths))
        if not stages == len(depths) == len(dims):
            raise ConfigError(
                f"{r.where}: num_stages {stages}, depths {list(depths)} and hidden_sizes "
                f"{list(dims)} do not go together",
                hint="take config.json and weights from the same tower folder",
            )
        if taps not in ((-1,), (-2,)):
            raise ConfigError(
                f"{r.where}: select layer {list(taps)} has no meaning for a ConvNeXt",
                hint="implemented: -1 (the last stage), -2 (without its last block)",
            )
        if taps == (-2,):
            depths = (*depths[:-1], depths[-1] - 1)
        return cls(
            depths,
            dims,
            patch=r.count("patch_size", 4),
            scaled=r.take("layer_scale_init_value", float, 1e-6) > 0,
            image_size=r.count("image_size", 224),
            final_eps=r.positive("layer_norm_eps", 1e-12),
        )

    @property
    def pixels(self) -> tuple[str, str]:
        """Height and width change from image to image."""
        return "height", "width"

    @property
    def tokens(self) -> str:
        """So does the number of tokens."""
        return "tokens"

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Channels of the output."""
        return self.dims[-1:]

    @property
    def stride(self) -> int:
        """Pixels per token and side."""
        return self.patch << (len(self.depths) - 1)


def forward(op: Ops[T], c: Config, w: Weights[T], pixels: T) -> tuple[T, ...]:
    """pixels [B, 3, H, W] -> [B, H // stride * W // stride, dims[-1]], row by row.

    Channels stay last between the convolutions, as norms and linears take them: a block needs no
    transposes but those around its depthwise convolution, which its kernels do on the way.
    """
    x = op.conv(pixels, w / "stem" / "conv", stride=c.patch)
    x = op.layer_norm(convnet.channels_last(op, x), w / "stem" / "norm", c.eps)
    for s, depth in enumerate(c.depths):
        stage = w / f"stages.{s}"
        if s:
            x = op.layer_norm(x, stage / "down" / "norm", c.eps)
            x = op.linear(convnet.squares(op, x), stage / "down" / "linear")
        for j in range(depth):
            x = op.block(_block, stage / f"blocks.{j}", x, c, c.dims[s])
    return (op.reshape(x, (0, -1, c.dims[-1])),)


def _block(op: Ops[T], w: Weights[T], x: T, c: Config, channels: int) -> T:
    y = convnet.channels_first(op, x)
    y = op.conv(y, w / "depthwise", stride=1, padding=3, groups=channels)
    y = op.layer_norm(convnet.channels_last(op, y), w / "norm", c.eps)
    y = op.linear(op.gelu(op.linear(y, w / "up")), w / "down")
    if c.scaled:
        y = op.mul(y, w["scale"])
    return op.add(x, y)


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors."""
    tensors = convnet.conv_shapes("stem.conv", 3, c.dims[0], c.patch)
    tensors |= convnet.norm_shapes("stem.norm", c.dims[0])
    for s, (depth, d) in enumerate(zip(c.depths, c.dims, strict=True)):
        if s:
            before = c.dims[s - 1]
            tensors |= convnet.norm_shapes(f"stages.{s}.down.norm", before)
            tensors |= {f"stages.{s}.down.linear.weight": (4 * before, d)}
            tensors |= {f"stages.{s}.down.linear.bias": (d,)}
        for j in range(depth):
            block = f"stages.{s}.blocks.{j}"
            tensors |= convnet.conv_shapes(f"{block}.depthwise", d, d, 7, groups=d)
            tensors |= convnet.norm_shapes(f"{block}.norm", d)
            tensors |= {f"{block}.up.weight": (d, 4 * d), f"{block}.up.bias": (4 * d,)}
            tensors |= {f"{block}.down.weight": (4 * d, d), f"{block}.down.bias": (d,)}
            if c.scaled:
                tensors[f"{block}.scale"] = (d,)
    return tensors


_BLOCK = {"depthwise": "dwconv", "norm": "layernorm", "up": "pwconv1", "down": "pwconv2"}


def names(c: Config) -> Mapping[str, Recipe]:
    """Where each of our tensors stands in a ConvNextModel file."""
    return {key: _recipe(key) for key in shapes(c)}


def _recipe(key: str) -> Recipe:
    layer, leaf = key.rsplit(".", 1)
    if layer.startswith("stem"):
        theirs = "patch_embeddings" if layer.endswith("conv") else "layernorm"
        return keep(f"embeddings.{theirs}.{leaf}")
    _, stage, path_in_stage = layer.split(".", 2)
    if path_in_stage.startswith("down."):
        number = 1 if path_in_stage.endswith("linear") else 0
        stored = f"encoder.stages.{stage}.downsampling_layer.{number}.{leaf}"
        return convnet.of_squares(stored) if number and leaf == "weight" else keep(stored)
    _, block, *name = path_in_stage.split(".")
    source = f"encoder.stages.{stage}.layers.{block}"
    if leaf == "scale":
        return keep(f"{source}.layer_scale_parameter")
    linear = name[0] in ("up", "down") and leaf == "weight"
    return (flip if linear else keep)(f"{source}.{_BLOCK[name[0]]}.{leaf}")


def unused(c: Config) -> tuple[str, ...]:
    """The final norm, and the last block where it was taken away."""
    last, count = len(c.depths) - 1, c.depths[-1]
    return ("layernorm.*", f"encoder.stages.{last}.layers.{count}.*")


# -- the tower by itself -----------------------------------------------------------------------

POOLINGS = ("mean",)


def embed(op: Ops[T], c: Config, w: Weights[T], pixels: T, pooling: str = "mean") -> T:
    """pixels [B, 3, H, W] -> [B, dims[-1]]: the mean of the last stage behind the final norm, a
    ConvNextModel's pooled output.
    """
    mean = op.reshape(op.mean(forward(op, c, w, pixels)[0], (1,)), (0, c.dims[-1]))
    return op.layer_norm(mean, w / "norm_post", c.final_eps)


def embed_shapes(c: Config, pooling: str = "mean") -> dict[str, tuple[int, ...]]:
    """Our tensors, with the final norm."""
    return shapes(c) | convnet.norm_shapes("norm_post", c.dims[-1])


def embed_names(c: Config, pooling: str = "mean") -> Mapping[str, Recipe]:
    """Where the tensors of `embed` stand in a ConvNextModel file."""
    norm = {f"norm_post.{leaf}": keep(f"layernorm.{leaf}") for leaf in ("weight", "bias")}
    return {**names(c), **norm}


def embed_unused(c: Config, pooling: str = "mean") -> tuple[str, ...]:
    """Nothing: every tensor of the file is read."""
    return ()


def tiny() -> Config:
    """A small instance for tests."""
    return Config(depths=(1, 1, 2), dims=(8, 16, 24))
