"""Tensors that stand in no file."""

from __future__ import annotations

from edgevlm.toolkit.ops.vocabulary import Array


class Memory:
    """Stored tensors; counts what is read."""

    def __init__(self, tensors: dict[str, Array]) -> None:
        self.tensors = tensors
        self.seen: list[str] = []

    def keys(self) -> list[str]:
        return list(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def read(self, key: str) -> Array:
        self.seen.append(key)
        return self.tensors[key]
