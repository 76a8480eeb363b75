"""UniRepLKNet (Ding et al., arXiv 2311.15599) with five stages: ConvLLaVA's second tower.

Always in its merged form: parallel dilated branches, batch norms and layer scales are folded into
one convolution and one linear per block when the file is read (or read as merged). Any image
size; every stride-2 convolution rounds up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgevlm.toolkit.errors import CheckpointError
from edgevlm.toolkit.models import convnet
from edgevlm.toolkit.models.recipes import Recipe, flat, flip, keep
from edgevlm.toolkit.ops.vocabulary import Array, Ops, T, Weights

MODEL_TYPES = ("lknet", "unireplknet")
BRANCHES = {  # kernel -> (kernel, dilation) of the parallel branches
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
_LAYER_EPS, _BATCH_EPS, _RESPONSE_EPS = 1e-6, 1e-5, 1e-6


@dataclass(frozen=True)
class Config:
    """`kernels`: the depthwise kernel of every block, by stage. merged: whether the file is."""

    dims: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...]
    merged: bool = True

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], where: str) -> Config:
        """Sizes from the tensors' shapes: the original hard-codes them and reads no config.

        Raises CheckpointError where they are not those of such a network.
        """
        kernel_sizes: dict[tuple[int, int], int] = {}
        dims: dict[int, int] = {}
        for key in sorted(shapes):
            match = re.fullmatch(r"stages\.(\d+)\.(\d+)\.dwconv\.(?:lk_origin\.)?weight", key)
            if match:
                shape = shapes[key]
                kernel_sizes[int(match[1]), int(match[2])] = shape[2]
                dims[int(match[1])] = shape[0]
        if sorted(dims) != list(range(len(dims))) or not dims:
            raise CheckpointError(
                f"{where} holds no UniRepLKNet (stages.0.0.dwconv and on)",
                hint="mm_vision_tower must name the tower's weight file",
            )
        depths = [1 + max(j for s, j in kernel_sizes if s == stage) for stage in sorted(dims)]
        kernels = tuple(tuple(kernel_sizes[s, j] for j in range(n)) for s, n in enumerate(depths))
        merged = "stages.0.0.norm.weight" not in shapes
        return cls(tuple(dims[s] for s in sorted(dims)), kernels, merged)

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


def forward(op: Ops[T], c: Config, w: Weights[T], pixels: T) -> tuple[T, ...]:
    """pixels [B, 3, H, W] -> [B, ceil(H / 64) * ceil(W / 64), dims[-1]] for five stages."""
    stem = w / "stem"
    x = op.conv(pixels, stem / "conv1", stride=2, padding=1)
    x = op.gelu(convnet.channel_norm(op, x, stem / "norm1", _LAYER_EPS))
    x = op.conv(x, stem / "conv2", stride=2, padding=1)
    x = convnet.channel_norm(op, x, stem / "norm2", _LAYER_EPS)
    for s, kernels in enumerate(c.kernels):
        stage = w / f"stages.{s}"
        if s:
            x = op.conv(x, stage / "down" / "conv", stride=2, padding=1)
            x = convnet.channel_norm(op, x, stage / "down" / "norm", _LAYER_EPS)
        for j, kernel in enumerate(kernels):
            x = op.block(_block, stage / f"blocks.{j}", x, c.dims[s], kernel)
    return (convnet.tokens(op, x, c.dims[-1]),)


def _block(op: Ops[T], w: Weights[T], x: T, channels: int, kernel: int) -> T:
    y = op.conv(x, w / "depthwise", stride=1, padding=kernel // 2, groups=channels)
    pooled = op.reshape(op.mean(y, (2, 3)), (0, channels))
    squeezed = op.relu(op.linear(pooled, w / "squeeze"))
    gate = op.sigmoid(op.linear(squeezed, w / "excite"))
    y = convnet.channels_last(op, op.mul(y, op.reshape(gate, (0, channels, 1, 1))))
    y = op.response_norm(op.gelu(op.linear(y, w / "up")), w / "response", _RESPONSE_EPS)
    return op.add(x, convnet.channels_first(op, op.linear(y, w / "down")))


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors, merged."""
    half = c.dims[0] // 2
    tensors = convnet.conv_shapes("stem.conv1", 3, half, 3)
    tensors |= convnet.norm_shapes("stem.norm1", half)
    tensors |= convnet.conv_shapes("stem.conv2", half, c.dims[0], 3)
    tensors |= convnet.norm_shapes("stem.norm2", c.dims[0])
    for s, (d, kernels) in enumerate(zip(c.dims, c.kernels, strict=True)):
        if s:
            tensors |= convnet.conv_shapes(f"stages.{s}.down.conv", c.dims[s - 1], d, 3)
            tensors |= convnet.norm_shapes(f"stages.{s}.down.norm", d)
        for j, kernel in enumerate(kernels):
            block = f"stages.{s}.blocks.{j}"
            tensors |= convnet.conv_shapes(f"{block}.depthwise", d, d, kernel, groups=d)
            linears = {"squeeze": (d, d // 4), "excite": (d // 4, d), "up": (d, 4 * d),
                       "down": (4 * d, d)}  # fmt: skip
            for name, size in linears.items():
                tensors |= {f"{block}.{name}.weight": size, f"{block}.{name}.bias": size[1:]}
            tensors[f"{block}.response.weight"] = (4 * d,)
    return tensors


def names(c: Config) -> Mapping[str, Recipe]:
    """How each of our tensors is made from the original's file, merged or not."""
    table: dict[str, Recipe] = {}
    numbers = {"conv1": 0, "norm1": 1, "conv2": 3, "norm2": 4}
    for name, number in numbers.items():
        for leaf in ("weight", "bias"):
            table[f"stem.{name}.{leaf}"] = keep(f"downsample_layers.0.{number}.{leaf}")
    for s, kernels in enumerate(c.kernels):
        for name, number in (("conv", 0), ("norm", 1)):
            for leaf in ("weight", "bias") if s else ():
                source = f"downsample_layers.{s}.{number}.{leaf}"
                table[f"stages.{s}.down.{name}.{leaf}"] = keep(source)
        for j, kernel in enumerate(kernels):
            make = _merged_block if c.merged else _open_block
            for ours, recipe in make(f"stages.{s}.{j}", kernel).items():
                table[f"stages.{s}.blocks.{j}.{ours}"] = recipe
    return table


def _common(block: str) -> dict[str, Recipe]:
    return {
        "squeeze.weight": _pointwise(f"{block}.se.down.weight"),
        "squeeze.bias": keep(f"{block}.se.down.bias"),
        "excite.weight": _pointwise(f"{block}.se.up.weight"),
        "excite.bias": keep(f"{block}.se.up.bias"),
        "up.weight": flip(f"{block}.pwconv1.1.weight"),
        "up.bias": keep(f"{block}.pwconv1.1.bias"),
        "response.weight": flat(f"{block}.act.1.gamma"),
    }


def _pointwise(source: str) -> Recipe:
    """A convolution of one pixel, stored [out, in, 1, 1], as a linear."""
    return Recipe(
        (source,), lambda x: x[:, :, 0, 0].T, lambda ours, *_: (ours.T[:, :, None, None],)
    )


def _merged_block(block: str, kernel: int) -> dict[str, Recipe]:
    conv = f"{block}.dwconv.lk_origin" if kernel in BRANCHES else f"{block}.dwconv"
    return _common(block) | {
        "depthwise.weight": keep(f"{conv}.weight"),
        "depthwise.bias": keep(f"{conv}.bias"),
        "down.weight": flip(f"{block}.pwconv2.0.weight"),
        "down.bias": keep(f"{block}.pwconv2.0.bias"),
    }


# -- merging -----------------------------------------------------------------------------------


def _batch(norm: str) -> tuple[str, ...]:
    return tuple(f"{norm}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var"))


def _affine(weight: Array, bias: Array, mean: Array, variance: Array) -> tuple[Array, Array]:
    """A batch norm as gain and shift, in float64."""
    gain = weight.astype(np.float64) / np.sqrt(variance.astype(np.float64) + _BATCH_EPS)
    return gain, bias - mean * gain


def _open_block(block: str, kernel: int) -> dict[str, Recipe]:
    branches = _branches(block, kernel)
    sources = tuple(name for conv, norm, _ in branches for name in (conv, *_batch(norm)))
    dilations = [dilation for *_, dilation in branches]
    if kernel not in BRANCHES:
        sources = (f"{block}.dwconv.weight",)
    sources += _batch(f"{block}.norm")

    def kernel_of(*tensors: Array) -> Array:
        return _merge_depthwise(tensors, dilations, kernel)[0]

    def bias_of(*tensors: Array) -> Array:
        return _merge_depthwise(tensors, dilations, kernel)[1]

    ends = (f"{block}.pwconv2.0.weight", f"{block}.act.1.beta", f"{block}.gamma",
            *_batch(f"{block}.pwconv2.2"))  # fmt: skip
    return _common(block) | {
        "depthwise.weight": Recipe(sources, kernel_of),
        "depthwise.bias": Recipe(sources, bias_of),
        "down.weight": Recipe(ends, lambda *t: _merge_down(*t)[0]),
        "down.bias": Recipe(ends, lambda *t: _merge_down(*t)[1]),
    }


def _branches(block: str, kernel: int) -> list[tuple[str, str, int]]:
    """(convolution, batch norm, dilation) of the large kernel and its parallel branches."""
    stem = f"{block}.dwconv"
    if kernel not in BRANCHES:
        return [(f"{stem}.weight", "", 1)]
    branches = [(f"{stem}.lk_origin.weight", f"{stem}.origin_bn", 1)]
    for size, dilation in BRANCHES[kernel]:
        tail = f"k{size}_{dilation}"
        branches.append((f"{stem}.dil_conv_{tail}.weight", f"{stem}.dil_bn_{tail}", dilation))
    return branches


def _merge_depthwise(
    tensors: tuple[Array, ...], dilations: list[int], kernel: int
) -> tuple[Array, Array]:
    """One kernel and bias for all branches and the block's own norm behind their sum."""
    *inner, weight, bias, mean, variance = tensors
    if len(inner) == 1:
        total, shift = inner[0].astype(np.float64), np.zeros(inner[0].shape[0])
    else:
        total, shift = np.zeros((inner[0].shape[0], 1, kernel, kernel)), np.zeros(1)
        for number, dilation in enumerate(dilations):
            conv, *norm = inner[5 * number : 5 * number + 5]
            gain, offset = _affine(*norm)
            total = total + _spread(conv, dilation, kernel) * gain[:, None, None, None]
            shift = shift + offset
    gain, offset = _affine(weight, bias, mean, variance)
    merged, moved = total * gain[:, None, None, None], shift * gain + offset
    return merged.astype(np.float32), moved.astype(np.float32)


def _spread(conv: Array, dilation: int, kernel: int) -> Array:
    """A dilated kernel as a dense one, centred in the large one."""
    size = dilation * (conv.shape[2] - 1) + 1
    wide = np.zeros((*conv.shape[:2], kernel, kernel))
    first = (kernel - size) // 2
    wide[:, :, first : first + size : dilation, first : first + size : dilation] = conv
    return wide


def _merge_down(weight: Array, beta: Array, gamma: Array, *norm: Array) -> tuple[Array, Array]:
    """[in, out] and bias: the response norm's shift, the batch norm and the layer scale inside."""
    wide = weight.astype(np.float64)
    gain, offset = _affine(norm[0], norm[1], norm[2], norm[3])
    through = wide @ beta.reshape(-1).astype(np.float64)
    merged = wide * (gain * gamma)[:, None]
    return merged.T.astype(np.float32), ((through * gain + offset) * gamma).astype(np.float32)


def unused(c: Config) -> tuple[str, ...]:
    """What the file holds beside the tower: its classifier, final norm and batch counters."""
    return ("norm.*", "head.*", "*.num_batches_tracked")


# -- the tower by itself -----------------------------------------------------------------------

POOLINGS = ("mean", "plain-mean")


def embed(op: Ops[T], c: Config, w: Weights[T], pixels: T, pooling: str = "mean") -> T:
    """pixels [B, 3, H, W] -> [B, dims[-1]]: the mean of the last stage.

    mean: behind the final norm, what the original's classifier reads; plain-mean: as it is, for
    files without that norm, as ConvLLaVA's own tower saves them.
    """
    mean = op.reshape(op.mean(forward(op, c, w, pixels)[0], (1,)), (0, c.dims[-1]))
    return mean if pooling == "plain-mean" else op.layer_norm(mean, w / "norm_post", _LAYER_EPS)


def embed_shapes(c: Config, pooling: str = "mean") -> dict[str, tuple[int, ...]]:
    """Our tensors, with the final norm if it is used."""
    norm = convnet.norm_shapes("norm_post", c.dims[-1]) if pooling == "mean" else {}
    return shapes(c) | norm


def embed_names(c: Config, pooling: str = "mean") -> Mapping[str, Recipe]:
    """How the tensors of `embed` are made from the original's file."""
    norm = {f"norm_post.{leaf}": keep(f"norm.{leaf}") for leaf in ("weight", "bias")}
    return {**names(c), **(norm if pooling == "mean" else {})}


def embed_unused(c: Config, pooling: str = "mean") -> tuple[str, ...]:
    """The classifier, batch counters, and the norm if it is not used."""
    return unused(c) if pooling == "plain-mean" else ("head.*", "*.num_batches_tracked")


def tiny() -> Config:
    """A small instance for tests."""
    return Config(dims=(8, 16, 24), kernels=((3,), (7,), (5, 3)))
