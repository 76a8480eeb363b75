"""LLaVA-NeXT's pooler projector: a 2 x 2 convolution of stride 2, GELU, linear.

Source: LLaVA-VL/LLaVA-NeXT, PoolerProjector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgevlm.toolkit.models import convnet, vit
from edgevlm.toolkit.models.recipes import Recipe, flip, keep
from edgevlm.toolkit.ops.vocabulary import Ops, T, Weights


@dataclass(frozen=True)
class Config:
    """side: tokens per row of the encoder's grid."""

    inputs: int
    outputs: int
    side: int

    @property
    def sources(self) -> tuple[int, ...]:
        """Channels of the tensor the merger takes."""
        return (self.inputs,)


def forward(op: Ops[T], c: Config, w: Weights[T], features: Sequence[T]) -> T:
    """features: one tensor [B, side^2, inputs] -> [B, (side // 2)^2, outputs]."""
    (x,) = features
    grid = op.reshape(op.transpose(x, (0, 2, 1)), (0, c.inputs, c.side, c.side))
    pooled = convnet.tokens(op, op.conv(grid, w / "pool", stride=2), c.outputs)
    return op.linear(op.gelu(pooled), w / "linear")


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors."""
    pool = convnet.conv_shapes("pool", c.inputs, c.outputs, 2)
    return pool | vit.linear_shapes({"linear": (c.outputs, c.outputs)})


def names(c: Config) -> Mapping[str, Recipe]:
    """Where they stand below `mm_projector.`."""
    return {
        "pool.weight": keep("conv_pool.weight"),
        "pool.bias": keep("conv_pool.bias"),
        "linear.weight": flip("proj.1.weight"),
        "linear.bias": keep("proj.1.bias"),
    }


def unused(c: Config) -> tuple[str, ...]:
    """Nothing: every tensor is read."""
    return ()


def tiny() -> Config:
    """A small instance for tests."""
    return Config(inputs=32, outputs=48, side=4)
