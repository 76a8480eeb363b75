"""Weights whose codes are known: chosen by calibration, or read from a quantized bundle.

Rounding the floats that codes stand for would find other scales, where no code of a block is at
the end of the range; so whoever stores such weights again takes the codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.blockwise import StorageFormat


@dataclass(frozen=True)
class Codes:
    """A weight as it is stored: codes [outputs, inputs], two in a byte at 4 bits, and scales.

    zero_points: [outputs, blocks], packed like the codes; order [inputs]: the input of each column;
    both where the storage has them.
    """

    storage: StorageFormat
    codes: Array
    scales: Array
    zero_points: Array | None = None
    order: Array | None = None

    def floats(self) -> Array:
        """The weight that the codes stand for, as the model takes it."""
        zeros, bits = self.zero_points, self.storage.bits
        if zeros is not None and bits == 4:
            zeros = blockwise.unpack(zeros)
        rows = blockwise.dequantize(self.codes, self.scales, bits, zeros)
        if self.order is not None:
            rows = blockwise.inputs_of(rows, self.order)
        return rows.T if self.storage.transposed else rows

    def part(self, tail: str) -> Array:
        """The tensor that is stored under a tail of blockwise.TAILS; "" is that of the codes."""
        parts = (self.codes, self.scales, self.zero_points, self.order)
        found = dict(zip(("", *blockwise.TAILS), parts, strict=True))[tail]
        assert found is not None
        return found

    def fit(self, storage: StorageFormat) -> bool:
        """Whether a file with weights in `storage` can hold these codes as they are."""
        block = self.codes.shape[1] * 8 // self.storage.bits // self.scales.shape[1]
        wanted = storage.block_in(block * self.scales.shape[1])
        return block == wanted and replace(self.storage, block=None) == replace(storage, block=None)


@runtime_checkable
class Offers(Protocol):
    """Weights that may know the codes of some of them."""

    def codes(self, key: str) -> Codes | None:
        """The codes of the weight `key`; None if it is in float."""
        ...


class Coded(Mapping[str, Array]):
    """The weights of a component, some of them in codes; each is read when it is used."""

    def __init__(self, weights: Mapping[str, Array], codes: Mapping[str, Codes]) -> None:
        self._weights = weights
        self._codes = codes

    def codes(self, key: str) -> Codes | None:
        return self._codes.get(key)

    def __getitem__(self, key: str) -> Array:
        found = self._codes.get(key)
        return self._weights[key] if found is None else found.floats()

    def __contains__(self, key: object) -> bool:
        return key in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
