"""Which bound buffers a runner keeps, so that a call with shapes seen before binds nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

B = TypeVar("B")

KEPT_DECODE, KEPT_OTHERS = 8, 4


class Bindings(Generic[B]):
    """The bindings of one state.

    Bindings of single tokens, which every decode step uses, are kept apart from the others, so
    that prompts of many lengths never replace them. Of each kind the least recently used is
    dropped first.
    """

    def __init__(self) -> None:
        self._decode: dict[Hashable, B] = {}
        self._others: dict[Hashable, B] = {}

    def __len__(self) -> int:
        return len(self._decode) + len(self._others)

    def get(self, key: Hashable, make: Callable[[], B], *, decode: bool) -> B:
        """The binding of `key`, made if there is none yet."""
        kept, most = (self._decode, KEPT_DECODE) if decode else (self._others, KEPT_OTHERS)
        binding = kept.pop(key, None)
        if binding is None:
            binding = make()
        kept[key] = binding  # a dict keeps its order: the last entry is the most recently used
        if len(kept) > most:
            del kept[next(iter(kept))]
        return binding
