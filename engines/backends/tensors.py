"""Arrays between components: in the host's memory, or kept where they were computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from edgevlm.engines.backends import Runner
from edgevlm.toolkit.ops.vocabulary import Array

Tensor = Any  # an Array, or a Kept of the backend that is asked


class Kept(Protocol):
    """An array in the memory of a device; only runners of the session that made it read it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an Array."""
        ...

    def joined(self, others: Sequence[Kept]) -> Kept:
        """This and others, one after the other on the first axis."""
        ...

    def numpy(self) -> Array:
        """A copy in the host's memory."""
        ...


@runtime_checkable
class Keeps(Protocol):
    """A Runner that can leave its outputs where they are."""

    def keep(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As Runner.run of a component without a state; outputs are valid until dropped."""
        ...


def keep(runner: Runner, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a component without a state whose outputs other components read; they stay valid."""
    if isinstance(runner, Keeps):
        return runner.keep(inputs)
    return {name: np.array(array) for name, array in runner.run(inputs).items()}


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one kind, one after the other on the first axis; a single one as it is."""
    first, *others = tensors
    if not others:
        return first
    return np.concatenate(tensors) if isinstance(first, np.ndarray) else first.joined(others)
