"""MMFuser (Cao et al., arXiv 2410.11829): CLIP's deep layer attends to its shallow ones.

Deformable cross-attention from the deep level's tokens into four shallower levels, deformable
self-attention on the result, both scaled by learned vectors and added to the deep level; then
LLaVA's MLP. Source: yuecao0119/MMFuser, MSCrossAttnBlock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edgevlm.toolkit.models import vit
from edgevlm.toolkit.models.mergers import mlp
from edgevlm.toolkit.models.recipes import Recipe, flip, keep
from edgevlm.toolkit.ops.vocabulary import Array, Ops, T, Weights, read_only

LEVELS = 4
_EPS = 1e-6


@dataclass(frozen=True)
class Config:
    """hidden_size: channels of every level; side: tokens per row; layers: linears that follow."""

    hidden_size: int
    side: int
    outputs: int
    layers: int = 2
    num_heads: int = 16
    num_points: int = 4

    @property
    def sources(self) -> tuple[int, ...]:
        """Channels of the four key/value levels, in order, and of the query."""
        return (self.hidden_size,) * (LEVELS + 1)

    @property
    def projector(self) -> mlp.Config:
        """The linears behind the fuser."""
        return mlp.Config((self.hidden_size,), self.outputs, self.layers)


def forward(op: Ops[T], c: Config, w: Weights[T], features: Sequence[T]) -> T:
    """features: five tensors [B, side^2, hidden_size] -> [B, side^2, outputs]."""
    *levels, query = features
    fuser = w / "fuser"
    values = op.layer_norm(op.concat(levels, 1), fuser / "norm_features", _EPS)
    normed = op.layer_norm(query, fuser / "norm_query", _EPS)
    a = _attention(op, c, fuser / "cross", normed, values, LEVELS)
    n = op.layer_norm(a, fuser / "norm_self", _EPS)
    b = _attention(op, c, fuser / "self", n, n, 1)
    a = op.add(a, op.mul(b, fuser["gamma2"]))
    fused = op.add(query, op.mul(a, fuser["gamma1"]))
    return mlp.forward(op, c.projector, w / "projector", [fused])


def _attention(op: Ops[T], c: Config, w: Weights[T], query: T, values: T, levels: int) -> T:
    mixed = op.ms_deform_attn(
        op.linear(values, w / "value"),
        op.linear(query, w / "offsets"),
        op.linear(query, w / "scores"),
        grid=(c.side, c.side),
        num_levels=levels,
        num_heads=c.num_heads,
        num_points=c.num_points,
        head_dim=c.hidden_size // c.num_heads,
        reference=cell_centres(c.side),
    )
    return op.linear(mixed, w / "out")


@lru_cache(maxsize=8)
def cell_centres(side: int) -> Array:
    """[side^2, 2] float32: (x, y) of every cell's centre in 0..1, row by row; read-only."""
    centres = (np.arange(side, dtype=np.float32) + 0.5) / side
    rows, columns = np.meshgrid(centres, centres, indexing="ij")
    return read_only(np.stack([columns.reshape(-1), rows.reshape(-1)], -1))


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors."""
    d = c.hidden_size
    tensors = vit.norm_shapes(
        "fuser.norm_query", "fuser.norm_features", "fuser.norm_self", hidden_size=d
    )
    tensors |= {"fuser.gamma1": (d,), "fuser.gamma2": (d,)}
    for name, levels in (("cross", LEVELS), ("self", 1)):
        samples = c.num_heads * levels * c.num_points
        sizes = {"value": (d, d), "out": (d, d), "offsets": (d, 2 * samples),
                 "scores": (d, samples)}  # fmt: skip
        linears = {f"fuser.{name}.{linear}": size for linear, size in sizes.items()}
        tensors |= vit.linear_shapes(linears)
    return tensors | {f"projector.{n}": s for n, s in mlp.shapes(c.projector).items()}


_NORMS = {"norm_query": "query_norm", "norm_features": "feat_norm", "norm_self": "norm1"}
_LINEARS = {
    "value": "value_proj",
    "out": "output_proj",
    "offsets": "sampling_offsets",
    "scores": "attention_weights",
}


def fuser_names() -> dict[str, Recipe]:
    """Where the fuser's tensors stand in its own module."""
    table = {name: keep(name) for name in ("gamma1", "gamma2")}
    for ours, theirs in _NORMS.items():
        for leaf in ("weight", "bias"):
            table[f"{ours}.{leaf}"] = keep(f"{theirs}.{leaf}")
    for ours, theirs in {"cross": "cross_attn", "self": "self_attn"}.items():
        for linear, source in _LINEARS.items():
            table[f"{ours}.{linear}.weight"] = flip(f"{theirs}.{source}.weight")
            table[f"{ours}.{linear}.bias"] = keep(f"{theirs}.{source}.bias")
    return table


def names(c: Config) -> Mapping[str, Recipe]:
    """Where they stand below `mm_projector.`: the fuser is 0, the linears 1, 3, 5 …"""
    table = {f"fuser.{name}": recipe.below("0.") for name, recipe in fuser_names().items()}
    for i in range(c.layers):
        table[f"projector.linears.{i}.weight"] = flip(f"{2 * i + 1}.weight")
        table[f"projector.linears.{i}.bias"] = keep(f"{2 * i + 1}.bias")
    return table


def unused(c: Config) -> tuple[str, ...]:
    """Nothing: every tensor is read."""
    return ()


def tiny() -> Config:
    """A small instance for tests."""
    return Config(hidden_size=32, side=4, outputs=48, num_heads=4, num_points=2)
