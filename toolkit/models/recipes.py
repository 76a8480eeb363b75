"""Recipes: how one of our tensors is made from those of a published checkpoint, and put back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array


@dataclass(frozen=True)
class Recipe:
    """One of our tensors, made from the checkpoint tensors `sources` by `make`.

    undo: the inverse. It takes our tensor and the stored ones, and returns these with ours in them,
    so that `make` of the result is our tensor; None where there is no exact one, as for a batch
    norm that `make` folds into a convolution.
    """

    sources: tuple[str, ...]
    make: Callable[..., Array]
    undo: Callable[..., tuple[Array, ...]] | None = None

    def below(self, prefix: str) -> Recipe:
        """The same recipe where every source stands below `prefix`."""
        return replace(self, sources=tuple(prefix + source for source in self.sources))


def same(x: Array) -> Array:
    """The tensor itself."""
    return x


def transposed(x: Array) -> Array:
    """[a, b] -> [b, a]."""
    return np.asarray(x.T)


def keep(source: str) -> Recipe:
    """The stored tensor as it is."""
    return Recipe((source,), same, lambda ours, *_: (ours,))


def flip(source: str) -> Recipe:
    """A linear's weight: stored [out, in] by torch, [in, out] by us."""
    return Recipe((source,), transposed, lambda ours, *_: (ours.T,))


def flat(source: str) -> Recipe:
    """The stored values as one vector (a token kept as [1, 1, width])."""
    return Recipe((source,), _ravel, lambda ours, stored: (ours.reshape(stored.shape),))


def _ravel(x: Array) -> Array:
    return np.asarray(x.reshape(-1))


def first(source: str) -> Recipe:
    """The only entry of a leading axis: stored [1, ...]."""
    return Recipe((source,), lambda x: x[0], lambda ours, *_: (ours[None],))


def part(source: str, number: int, count: int) -> Recipe:
    """Part `number` of `count` that a joined linear's rows are cut into, as [in, out].

    Stored [count * out, in], or [count * out] for a bias.
    """

    def undo(ours: Array, stored: Array) -> tuple[Array, ...]:
        parts = [*np.split(stored, count)]
        parts[number] = ours.T
        return (np.concatenate(parts),)

    return Recipe((source,), lambda x: np.split(x, count)[number].T, undo)


def rows_of(recipe: Recipe, rows: int, axis: int) -> Recipe:
    """The first `rows` entries along `axis` of what a recipe makes: a vocabulary that was cut."""

    def make(*stored: Array) -> Array:
        whole = recipe.make(*stored)
        return whole[:rows] if axis == 0 else whole[:, :rows]

    def undo(ours: Array, *stored: Array) -> tuple[Array, ...]:
        whole = recipe.make(*stored)
        rest = whole[rows:] if axis == 0 else whole[:, rows:]
        assert recipe.undo is not None
        return recipe.undo(np.concatenate([ours, rest], axis), *stored)

    return replace(recipe, make=make, undo=None if recipe.undo is None else undo)
