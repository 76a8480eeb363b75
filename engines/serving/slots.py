"""The slots of one KV buffer: who uses which, and what those hold that nobody uses.

What was read of a prompt is kept until its slot is needed: a later prompt that begins in the same
way goes on from there. A prefix is used where it is, or copied from another slot. Generated tokens
are no part of it: kernels for one token round otherwise than those for a prompt, and an answer
must not depend on who asked before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from edgevlm.engines.backends.state import State
from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.session import Session
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.prompt_key import common
from edgevlm.toolkit.ops.vocabulary import Array

GRID = 16  # prompts are cut at multiples of this: kernels work on so many rows together, or fewer


class Slots:
    """All slots of a state. movable: whether they can be copied and exchanged."""

    def __init__(self, state: State, count: int) -> None:
        """count: the slots that can be taken; the state may have more."""
        self.state, self.count = state, count
        self.movable = state.movable
        self._held = [np.zeros(0, np.int64) for _ in range(state.count)]
        self._taken = [False] * state.count  # those beyond `count` are never taken
        self._used = [0] * state.count
        self._time = 0

    @property
    def free(self) -> int:
        """Slots that nobody uses."""
        return self._taken[: self.count].count(False)

    def take(self, key: Array, *, reuse: bool = True) -> tuple[int, int]:
        """A free slot for a prompt, and how many of its first positions the slot holds.

        At least two positions are left to be read, as one alone has kernels of its own.
        """
        lengths = [max(min(common(h, key), len(key) - 2), 0) // GRID * GRID for h in self._held]
        slot, kept = self._chosen(lengths)
        best = max(range(self.count), key=lengths.__getitem__)
        if reuse and self.movable and lengths[best] > kept:
            self.state.copy(best, slot, kept, lengths[best])
            kept = lengths[best]
        self._taken[slot] = True
        kept = kept if reuse else 0
        self._held[slot] = key[:kept]
        return slot, kept

    def _chosen(self, lengths: list[int]) -> tuple[int, int]:
        """Of the free slots the one that holds most of the prompt, if that is most of what it
        holds; otherwise the one that was used least recently, as the other is somebody's.
        """
        free = [slot for slot in range(self.count) if not self._taken[slot]]
        fitting = max(free, key=lambda slot: (lengths[slot], self._used[slot]))
        if not 0 < len(self._held[fitting]) <= 2 * lengths[fitting]:
            fitting = min(free, key=lambda slot: (len(self._held[slot]) > 0, self._used[slot]))
        return fitting, lengths[fitting]

    def hold(self, slot: int, key: Array) -> None:
        """What the slot holds of a prompt now, from the first position on."""
        self._held[slot] = key
        self._time += 1
        self._used[slot] = self._time

    def release(self, slot: int) -> None:
        """Nobody uses the slot any more; it keeps what it holds."""
        self._taken[slot] = False

    def held(self, slot: int) -> int:
        """How many positions the slot holds of a prompt."""
        return len(self._held[slot])

    def shorten(self, slot: int, length: int) -> None:
        """The slot holds no more than `length` positions."""
        self._held[slot] = self._held[slot][:length]

    def swap(self, a: int, b: int, most: int) -> None:
        """Exchange two slots, of which the first `most` positions matter."""
        self.state.exchange(a, b, most)
        tables: tuple[list[Any], ...] = (self._held, self._taken, self._used)
        for table in tables:
            table[a], table[b] = table[b], table[a]


def require_memory(session: Session, limits: Limits) -> None:
    """Raise OutOfMemory if the KV caches of all slots do not fit into what is free."""
    one = memory.of_engine(session.engine)
    caches = replace(
        one, weights_bytes=0, activations_bytes=0, cache_bytes=one.cache_bytes * limits.slots
    )
    what = f"the KV cache of {limits.slots} slots"
    memory.require(caches, what, session.engine.parsed_target())
