"""LLaVA's projectors: linear, mlp{N}x_gelu and mlp{N}x_res{R}x_gelu over an encoder's tokens.

Exact (erf) GELU between the linears; a residual block is y + MLP(y) with y = layer_norm(x).
Source: haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT, the projector builders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgevlm.toolkit.models import vit
from edgevlm.toolkit.models.recipes import Recipe, flip, keep
from edgevlm.toolkit.ops.vocabulary import Ops, T, Weights

_EPS = 1e-5


@dataclass(frozen=True)
class Config:
    """`layers` linears from the channels of all `inputs` together to `outputs` (the LM's width).

    `blocks` residual blocks follow. No linears: the features as they are (identity).
    """

    inputs: tuple[int, ...]
    outputs: int
    layers: int = 2
    bias: bool = True
    blocks: int = 0

    @property
    def sources(self) -> tuple[int, ...]:
        """Channels of each tensor the merger takes."""
        return self.inputs


def forward(op: Ops[T], c: Config, w: Weights[T], features: Sequence[T]) -> T:
    """features: each [B, tokens, inputs[i]], joined on channels -> [B, tokens, outputs]."""
    x = op.concat(features, 2) if len(features) > 1 else features[0]
    for i in range(c.layers):
        x = op.linear(op.gelu(x) if i else x, w / f"linears.{i}")
    for i in range(c.blocks):
        block = w / f"blocks.{i}"
        x = op.layer_norm(x, block / "norm", _EPS)
        x = op.add(x, op.linear(op.gelu(op.linear(x, block / "up")), block / "down"))
    return x


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors."""
    sizes = {f"linears.{i}": (c.outputs if i else sum(c.inputs), c.outputs)
             for i in range(c.layers)}  # fmt: skip
    tensors = vit.linear_shapes(sizes, c.bias)
    for i in range(c.blocks):
        tensors |= vit.norm_shapes(f"blocks.{i}.norm", hidden_size=c.outputs)
        square = (c.outputs, c.outputs)
        tensors |= vit.linear_shapes({f"blocks.{i}.up": square, f"blocks.{i}.down": square})
    return tensors


def names(c: Config) -> Mapping[str, Recipe]:
    """Where they stand below `mm_projector.`: 0, 2, 4 … with GELU between; alone if linear."""
    table = {}
    for i in range(c.layers):
        stem = "" if c.layers == 1 and not c.blocks else f"{2 * i}."
        table[f"linears.{i}.weight"] = flip(f"{stem}weight")
        if c.bias:
            table[f"linears.{i}.bias"] = keep(f"{stem}bias")
    for i in range(c.blocks):
        source = f"{2 * c.layers - 1 + i}"
        for leaf in ("weight", "bias"):
            change = flip if leaf == "weight" else keep
            table[f"blocks.{i}.norm.{leaf}"] = keep(f"{source}.pre_norm.{leaf}")
            table[f"blocks.{i}.up.{leaf}"] = change(f"{source}.proj.0.{leaf}")
            table[f"blocks.{i}.down.{leaf}"] = change(f"{source}.proj.2.{leaf}")
    return table


def unused(c: Config) -> tuple[str, ...]:
    """Nothing: every tensor is read."""
    return ()


def tiny() -> Config:
    """A small instance for tests."""
    return Config(inputs=(32, 24), outputs=48, blocks=1)
