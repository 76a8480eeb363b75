"""Recipes: how one of our tensors is made from those of a published checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array


@dataclass(frozen=True)
class Recipe:
    """One of our tensors, made from the checkpoint tensors `sources` by `make`."""

    sources: tuple[str, ...]
    make: Callable[..., Array]

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
    return Recipe((source,), same)


def flip(source: str) -> Recipe:
    """A linear's weight: stored [out, in] by torch, [in, out] by us."""
    return Recipe((source,), transposed)


def flat(source: str) -> Recipe:
    """The stored values as one vector (a token kept as [1, 1, width])."""
    return Recipe((source,), _ravel)


def _ravel(x: Array) -> Array:
    return np.asarray(x.reshape(-1))
