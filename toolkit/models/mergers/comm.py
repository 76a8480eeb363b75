"""COMM (Jiang et al., arXiv 2310.08825): many levels of CLIP and DINOv2, merged and joined.

v1 = sum over CLIP's levels of alpha_i Linear_i(LN_i(x_i)); v2 the same over DINOv2's deep levels,
then an MLP; the two joined on channels and projected. No code was published: points that the paper
leaves open are options here, docs/systems.md lists them. Tensor names are of our own format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgevlm.toolkit.models import vit
from edgevlm.toolkit.models.recipes import Recipe, flip, keep
from edgevlm.toolkit.ops.vocabulary import Array, Ops, T, Weights

Merge = Literal["norm_linear", "linear_norm", "layerscale", "mean", "mean_half", "conv1", "conv3"]
_BATCH_EPS = 1e-5


@dataclass(frozen=True)
class Branch:
    """How one encoder's levels become one.

    levels: its blocks, counted from 0, for the tensors' names. merge: the paper's variants:
    norm_linear is LLN-Layerscale as in Eq. 1, linear_norm the other order, layerscale a weighted
    sum, mean the plain one, mean_half the literal Eq. of "Mean(half)" (N/2 + 1 levels, divided by
    N/2), convK a convolution and batch norm before the weights. scale: weights as they are or
    through a softmax. mlp_depth MLPs of mlp_ratio follow.
    """

    name: str
    levels: tuple[int, ...]
    hidden_size: int
    merge: Merge = "norm_linear"
    scale: Literal["softmax", "raw"] = "softmax"
    mlp_depth: int = 0
    mlp_ratio: int = 4

    @property
    def count(self) -> int:
        """Number of levels."""
        return len(self.levels)


@dataclass(frozen=True)
class Config:
    """The branches in the order of the encoders. side: tokens per row (convolutions need it)."""

    branches: tuple[Branch, ...]
    outputs: int
    side: int
    eps: float = 1e-5

    @property
    def sources(self) -> tuple[int, ...]:
        """Channels of every level, branch by branch."""
        return tuple(b.hidden_size for b in self.branches for _ in b.levels)


def forward(op: Ops[T], c: Config, w: Weights[T], features: Sequence[T]) -> T:
    """features: the branches' levels, each [B, side^2, width] -> [B, side^2, outputs]."""
    merged, start = [], 0
    for branch in c.branches:
        levels = features[start : start + branch.count]
        merged.append(_branch(op, c, branch, w / branch.name, levels))
        start += branch.count
    return op.linear(op.concat(merged, 2), w / "project")


def _branch(op: Ops[T], c: Config, b: Branch, w: Weights[T], levels: Sequence[T]) -> T:
    x = _merged(op, c, b, w, levels)
    for i in range(b.mlp_depth):
        x = op.linear(op.gelu(op.linear(x, w / f"mlp.{i}" / "up")), w / f"mlp.{i}" / "down")
    return x


def _merged(op: Ops[T], c: Config, b: Branch, w: Weights[T], levels: Sequence[T]) -> T:
    if b.merge in ("mean", "mean_half"):
        divisor = b.count if b.merge == "mean" else b.count - 1
        return op.scale(_sum(op, levels), 1 / divisor)
    scale = op.softmax(w["scale"]) if b.scale == "softmax" else w["scale"]
    if b.merge == "norm_linear":
        return op.layer_merge(levels, w.replacing(scale=scale), c.eps)
    prepared = [_prepared(op, c, b, w / f"levels.{i}", x) for i, x in enumerate(levels)]
    return _sum(op, [op.mul(x, op.slice(scale, 0, i, i + 1)) for i, x in enumerate(prepared)])


def _prepared(op: Ops[T], c: Config, b: Branch, w: Weights[T], x: T) -> T:
    """What happens to a level before it is weighted."""
    if b.merge == "linear_norm":
        return op.layer_norm(op.linear(x, w / "linear"), w / "norm", c.eps)
    if b.merge in ("conv1", "conv3"):
        grid = op.reshape(op.transpose(x, (0, 2, 1)), (0, b.hidden_size, c.side, c.side))
        y = op.conv(grid, w / "conv", stride=1, padding=int(b.merge[-1]) // 2)
        return op.transpose(op.reshape(y, (0, b.hidden_size, -1)), (0, 2, 1))
    return x


def _sum(op: Ops[T], xs: Sequence[T]) -> T:
    total = xs[0]
    for x in xs[1:]:
        total = op.add(total, x)
    return total


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors; norm_linear keeps a branch's linears on top of each other."""
    tensors = vit.linear_shapes({"project": (sum(b.hidden_size for b in c.branches), c.outputs)})
    for b in c.branches:
        d, n = b.hidden_size, b.count
        branch: vit.Shapes = {} if b.merge.startswith("mean") else {"scale": (n,)}
        if b.merge == "norm_linear":
            branch |= {"norm.weight": (n, d), "norm.bias": (n, d)}
            branch |= {"linear.weight": (n * d, d), "linear.bias": (n, d)}
        for i in range(n):
            if b.merge == "linear_norm":
                branch |= vit.linear_shapes({f"levels.{i}.linear": (d, d)})
                branch |= vit.norm_shapes(f"levels.{i}.norm", hidden_size=d)
            if b.merge in ("conv1", "conv3"):
                k = int(b.merge[-1])
                branch |= {f"levels.{i}.conv.weight": (d, d, k, k), f"levels.{i}.conv.bias": (d,)}
        for i in range(b.mlp_depth):
            sizes = {f"mlp.{i}.up": (d, d * b.mlp_ratio), f"mlp.{i}.down": (d * b.mlp_ratio, d)}
            branch |= vit.linear_shapes(sizes)
        tensors |= {f"{b.name}.{name}": shape for name, shape in branch.items()}
    return tensors


# -- our checkpoint format ---------------------------------------------------------------------


def names(c: Config) -> Mapping[str, Recipe]:
    """Where they stand in a COMM checkpoint of our format.

    BRANCH.LEVEL.{norm,linear,post_norm,conv,bn}.*, BRANCH.scale, BRANCH.mlp.N.fc{1,2}.*, proj.*;
    LEVEL is the block's number in its encoder, counted from 0.
    """
    table = {"project.weight": flip("proj.weight"), "project.bias": keep("proj.bias")}
    for b in c.branches:
        recipes = _branch_names(b)
        table |= {f"{b.name}.{name}": r.below(f"{b.name}.") for name, r in recipes.items()}
    return table


def _branch_names(b: Branch) -> dict[str, Recipe]:
    table = {} if b.merge.startswith("mean") else {"scale": keep("scale")}
    if b.merge == "norm_linear":
        for module in ("norm", "linear"):
            for leaf in ("weight", "bias"):
                sources = tuple(f"{level}.{module}.{leaf}" for level in b.levels)
                square = module == "linear" and leaf == "weight"
                join = (_stacked_transposed, _cut_transposed) if square else (_stacked, _cut)
                table[f"{module}.{leaf}"] = Recipe(sources, *join)
    for i, level in enumerate(b.levels):
        if b.merge == "linear_norm":
            table[f"levels.{i}.linear.weight"] = flip(f"{level}.linear.weight")
            table[f"levels.{i}.linear.bias"] = keep(f"{level}.linear.bias")
            for leaf in ("weight", "bias"):
                table[f"levels.{i}.norm.{leaf}"] = keep(f"{level}.post_norm.{leaf}")
        if b.merge in ("conv1", "conv3"):
            table |= _folded_conv(f"levels.{i}.conv", f"{level}.conv", f"{level}.bn")
    for i in range(b.mlp_depth):
        for ours, theirs in (("up", "fc1"), ("down", "fc2")):
            table[f"mlp.{i}.{ours}.weight"] = flip(f"mlp.{i}.{theirs}.weight")
            table[f"mlp.{i}.{ours}.bias"] = keep(f"mlp.{i}.{theirs}.bias")
    return table


def _stacked(*levels: Array) -> Array:
    return np.stack(levels)


def _cut(ours: Array, *_: Array) -> tuple[Array, ...]:
    return tuple(ours)


def _stacked_transposed(*levels: Array) -> Array:
    return np.concatenate([level.T for level in levels])


def _cut_transposed(ours: Array, *_: Array) -> tuple[Array, ...]:
    return tuple(level.T for level in np.split(ours, ours.shape[0] // ours.shape[1]))


def _folded_conv(ours: str, conv: str, norm: str) -> dict[str, Recipe]:
    """A convolution with the batch norm behind it inside."""
    leaves = ("weight", "bias", "running_mean", "running_var")
    sources = (f"{conv}.weight", f"{conv}.bias", *(f"{norm}.{leaf}" for leaf in leaves))

    def weight(kernel: Array, _b: Array, gain: Array, _s: Array, _m: Array, var: Array) -> Array:
        return np.asarray(kernel * (gain / np.sqrt(var + _BATCH_EPS))[:, None, None, None])

    def bias(_k: Array, b: Array, gain: Array, shift: Array, mean: Array, var: Array) -> Array:
        return np.asarray((b - mean) * gain / np.sqrt(var + _BATCH_EPS) + shift)

    return {f"{ours}.weight": Recipe(sources, weight), f"{ours}.bias": Recipe(sources, bias)}


def unused(c: Config) -> tuple[str, ...]:
    """Batch counters."""
    return ("*.num_batches_tracked",)


def tiny() -> Config:
    """A small instance for tests: every way of merging at once."""
    merges: tuple[Merge, ...] = (
        "norm_linear", "linear_norm", "layerscale", "mean", "mean_half", "conv3",
    )  # fmt: skip
    branches = tuple(
        Branch(f"b{i}", (0, 2), 32, merge, "raw" if i % 2 else "softmax", mlp_depth=i % 3)
        for i, merge in enumerate(merges)
    )
    return Config(branches, outputs=48, side=4)
