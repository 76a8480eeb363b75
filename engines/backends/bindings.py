"""Which bound buffers a runner keeps, so that a call with shapes seen before binds nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

B = TypeVar("B")

KEPT_DECODE, KEPT_OTHERS = 8, 4


class Bindings(Generic[B]):
    """The bindings of one state.

    Those of single tokens, which every decode step uses, are kept apart from the others: however
    many lengths a prompt is read in, none replaces a decode binding. Of each kind the
    least recently used one goes first.
    """

    def __init__(self) -> None:
        self._decode: dict[Hashable, B] = {}
        self._others: dict[Hashable, B] = {}

    def __len__(self) -> int:
        return len(self._decode) + len(self._others)

    def get(self, key: Hashable, make: Callable[[], B], *, decode: bool) -> B:
        """The binding of `key`, made if it is not there."""
        kept, most = (self._decode, KEPT_DECODE) if decode else (self._others, KEPT_OTHERS)
        found = kept.pop(key, None)
        if found is None:
            found = make()
        kept[key] = found  # the last one is the one used last
        if len(kept) > most:
            del kept[next(iter(kept))]
        return found
