"""Values that new parameters begin with, as the originals draw them; the same for the same seed.

Linears and convolutions as torch.nn draws them by default, norms as ones and zeros. MMFuser's
fuser as yuecao0119/MMFuser resets it: it begins as the identity. COMM's level weights are equal.
Embeddings, positions and single tokens of a whole new model are N(0, 0.02), layer scales 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from edgevlm.toolkit.checkpoints.weights import Shapes
from edgevlm.toolkit.models.mergers import comm, mmfuser
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.vlm.components import components
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig

Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]
LAYER_SCALE = 1e-6  # ConvNeXt (Liu et al., arXiv 2201.03545)
SPREAD = 0.02  # standard deviation of embeddings and positions, as in BERT and ViT
_TABLES = ("position", "class_token", "class_angle", "registers", "embed.weight")
_LAYER_SCALES = (".scale", ".scale1", ".scale2")


class Initial(Mapping[str, Array]):
    """Tensors that are drawn when they are used, float32; each from the seed and its own name."""

    def __init__(self, shapes: Shapes, rule: Callable[[str], Draw], seed: int, label: str) -> None:
        self._shapes = dict(shapes)
        self._rule = rule
        self._seed = f"{seed}/{label}"

    def __getitem__(self, key: str) -> Array:
        digest = hashlib.sha256(f"{self._seed}/{key}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:16], "little"))
        return self._rule(key)(generator, self._shapes[key]).astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def merger(config: ComponentConfig, shapes: Shapes, seed: int) -> Initial:
    """A merger's tensors, and the newline token where `shapes` has one."""

    def rule(key: str) -> Draw:
        if key == "newline":  # LLaVA-NeXT: N(0, 1) / sqrt(width)
            return lambda g, shape: g.standard_normal(shape) / math.sqrt(shape[0])
        if config.kind == "comm" and key.endswith(".scale"):
            return _comm_scale(config.config, key)
        if config.kind == "mmfuser" and key.startswith("fuser."):
            found = _fuser(config.config, key)
            if found is not None:
                return found
        return _layer(key, shapes)

    return Initial(shapes, rule, seed, "merger")


def whole(model: ModelConfig, seed: int) -> dict[str, Initial]:
    """The tensors of every component that has any, for a small model that is trained from nothing.

    Layer scales begin at 1: the published 1e-6 are for hundreds of epochs.
    """
    parts = {part.name: part.shapes for part in components(model) if part.shapes}
    return {
        name: merger(model.merger, shapes, seed)
        if name == "merger"
        else Initial(shapes, _from_nothing(shapes), seed, name)
        for name, shapes in parts.items()
    }


def _from_nothing(shapes: Shapes) -> Callable[[str], Draw]:
    def rule(key: str) -> Draw:
        if key in _TABLES:
            return lambda g, shape: g.normal(0.0, SPREAD, shape)
        return _constant(1.0) if key.endswith(_LAYER_SCALES) else _layer(key, shapes)

    return rule


def convolutions(shapes: Shapes, seed: int) -> Initial:
    """Tensors of stages of a ConvNeXt, as torch draws them; its layer scales are 1e-6."""

    def rule(key: str) -> Draw:
        return _constant(LAYER_SCALE) if key.endswith(".scale") else _layer(key, shapes)

    return Initial(shapes, rule, seed, "convnext")


def _layer(key: str, shapes: Shapes) -> Draw:
    """torch.nn's default for norms, linears and convolutions: U(-1, 1) / sqrt(inputs)."""
    layer, _, leaf = key.rpartition(".")
    if any(name.startswith("norm") for name in layer.split(".")):
        return _constant(1.0 if leaf == "weight" else 0.0)
    bound = 1 / math.sqrt(_inputs(shapes[f"{layer}.weight"], shapes.get(f"{layer}.bias")))
    return lambda g, shape: g.uniform(-bound, bound, shape)


def _inputs(weight: tuple[int, ...], bias: tuple[int, ...] | None) -> int:
    """Inputs of one output: of a kernel [out, in, h, w], a linear [in, out], or of linears that
    stand on top of each other with a bias of two axes."""
    if len(weight) == 4:
        return math.prod(weight[1:])
    stacked = bias[0] if bias is not None and len(bias) == 2 else 1
    return weight[0] // stacked


def _constant(value: float) -> Draw:
    return lambda _, shape: np.full(shape, value)


def _comm_scale(c: comm.Config, key: str) -> Draw:
    """Every level counts the same: logits of 0, or shares of 1 / levels."""
    branch = next(b for b in c.branches if key == f"{b.name}.scale")
    return _constant(0.0 if branch.scale == "softmax" else 1 / branch.count)


def _fuser(c: mmfuser.Config, key: str) -> Draw | None:
    """MSDeformAttn's reset (Zhu et al., arXiv 2010.04159), gammas of 0; None for the norms."""
    layer, _, leaf = key.rpartition(".")
    name = layer.rpartition(".")[2]
    if leaf.startswith("gamma") or name == "scores":
        return _constant(0.0)
    if name in ("value", "out"):
        return _xavier if leaf == "weight" else _constant(0.0)
    if name == "offsets":
        return _constant(0.0) if leaf == "weight" else lambda _, shape: _directions(c, shape)
    return None


def _xavier(g: np.random.Generator, shape: tuple[int, ...]) -> Array:
    bound = math.sqrt(6 / sum(shape))
    return g.uniform(-bound, bound, shape)


def _directions(c: mmfuser.Config, shape: tuple[int, ...]) -> Array:
    """Offsets [heads, levels, points, (x, y)], flat: head m looks in direction 2 pi m / heads.

    Its larger component is p + 1 cells for point p, on every level.
    """
    angles = np.arange(c.num_heads, dtype=np.float32) * np.float32(2 * math.pi / c.num_heads)
    directions = np.stack([np.cos(angles), np.sin(angles)], -1)
    directions /= np.abs(directions).max(-1, keepdims=True)
    points = np.arange(1, c.num_points + 1, dtype=np.float32)
    levels = shape[0] // (2 * c.num_heads * c.num_points)
    offsets: Any = directions[:, None, None, :] * points[None, None, :, None]
    return np.asarray(np.broadcast_to(offsets, (c.num_heads, levels, c.num_points, 2)).reshape(-1))
