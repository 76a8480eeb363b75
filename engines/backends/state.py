"""The KV state of a component: the caller holds it, a runner keeps none of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.vlm.components import Port, zero_states


class Allocation:
    """Identifies the memory of one `new_state`; it lives as long as any State that uses it.

    What belongs to that memory, such as a runner's bindings, is kept in tables with weak keys.
    """

    def exchanged(self, a: int, b: int) -> None:
        """Slots `a` and `b` of the memory have changed places."""

    def copied(self, source: int, target: int) -> None:
        """Slot `target` of the memory holds what `source` does."""


@runtime_checkable
class MovableRows(Protocol):
    """An array on a device whose rows of the first axis can be copied and exchanged there."""

    def copy_row(self, source: int, target: int) -> None:
        """Make one row what another is."""
        ...

    def exchange_rows(self, a: int, b: int) -> None:
        """Make each of two rows what the other was."""
        ...


@dataclass(frozen=True, eq=False)
class State:
    """Consecutive slots of a KV cache, one sequence each.

    arrays: by the input that reads it, [slots, kv_heads, context, head_dim]; empty for a component
    without a state. NumPy's in float32 on the processor; on a card its own, in the model's format,
    whose slices of the first axis share memory too. Slots share memory with the state that they
    were taken from, and may be used in the same way: a prompt is read into one slot (batch 1), then
    any range of slots decodes in one batch, one token each.
    """

    arrays: Mapping[str, Any]
    count: int
    allocation: Allocation
    first: int = 0

    def slots(self, begin: int, end: int) -> State:
        """The slots from `begin` up to `end`. Raises InputError where there are none."""
        if not 0 <= begin < end <= self.count:
            raise InputError(f"slots {begin} to {end} are not among the {self.count} of the state")
        arrays = {name: array[begin:end] for name, array in self.arrays.items()}
        return State(arrays, end - begin, self.allocation, self.first + begin)

    def slot(self, index: int) -> State:
        """One slot."""
        return self.slots(index, index + 1)

    @property
    def movable(self) -> bool:
        """Whether slots can be copied and exchanged."""
        return all(isinstance(a, (np.ndarray, MovableRows)) for a in self.arrays.values())

    def copy(self, source: int, target: int, begin: int, end: int) -> None:
        """Copy the positions from `begin` up to `end` of a slot into another, on a device all."""
        for array in self.arrays.values():
            if isinstance(array, np.ndarray):
                array[target, :, begin:end] = array[source, :, begin:end]
            else:
                array.copy_row(source, target)
        self.allocation.copied(self.first + source, self.first + target)

    def exchange(self, a: int, b: int, most: int) -> None:
        """Exchange two slots, of which the first `most` positions matter."""
        for array in self.arrays.values():
            if isinstance(array, np.ndarray):
                moved = array[a, :, :most].copy()
                array[a, :, :most] = array[b, :, :most]
                array[b, :, :most] = moved
            else:
                array.exchange_rows(a, b)
        self.allocation.exchanged(self.first + a, self.first + b)


def zeros(
    inputs: Sequence[Port], outputs: Sequence[Port], *, context: int, slots: int = 1
) -> State:
    """A state for every input that an output updates, with `context` positions in each slot."""
    if slots < 1:
        raise InputError(f"a state of {slots} slots holds nothing")
    arrays = zero_states(inputs, outputs, {"batch": slots, "context": context})
    return State(arrays, slots, Allocation())


def check(state: State | None, names: Sequence[str], batch: int, component: str) -> State:
    """The state, if it is one of this component and has a slot for every row of the batch."""
    if state is None or any(name not in state.arrays for name in names):
        raise InputError(f"{component} needs a state of its own: one made by new_state()")
    if state.count != batch:
        raise InputError(f"{component} was given {batch} rows for {state.count} slots")
    return state
