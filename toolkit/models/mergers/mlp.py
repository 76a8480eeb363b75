"""LLaVA's projectors: linear, and mlp{N}x_gelu, over the patch tokens of an encoder.

Source: haotian-liu/LLaVA, the projector builder. Exact (erf) GELU between the linears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit.ops import Ops, T, Weights
from toolkit.weights import Recipe, flip, keep


@dataclass(frozen=True)
class Config:
    """`layers` linears from the channels of all `inputs` together to `outputs` (the LM's width)."""

    inputs: tuple[int, ...]
    outputs: int
    layers: int = 2
    bias: bool = True

    @property
    def sources(self) -> tuple[int, ...]:
        """Channels of each tensor the merger takes."""
        return self.inputs


def forward(op: Ops[T], c: Config, w: Weights[T], features: Sequence[T]) -> T:
    """features: each [B, tokens, inputs[i]], joined on channels -> [B, tokens, outputs]."""
    x = op.concat(features, 2) if len(features) > 1 else features[0]
    for i in range(c.layers):
        x = op.linear(op.gelu(x) if i else x, w / f"linears.{i}")
    return x


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors."""
    found: dict[str, tuple[int, ...]] = {}
    for i in range(c.layers):
        found[f"linears.{i}.weight"] = (c.outputs if i else sum(c.inputs), c.outputs)
        if c.bias:
            found[f"linears.{i}.bias"] = (c.outputs,)
    return found


def names(c: Config) -> Mapping[str, Recipe]:
    """Where they stand below `mm_projector.`: 0, 2, 4 … with GELU between; alone if linear."""
    table = {}
    for i in range(c.layers):
        stem = "" if c.layers == 1 else f"{2 * i}."
        table[f"linears.{i}.weight"] = flip(f"{stem}weight")
        if c.bias:
            table[f"linears.{i}.bias"] = keep(f"{stem}bias")
    return table


def tiny() -> Config:
    """A small instance for tests."""
    return Config(inputs=(32, 24), outputs=48)
