"""What passes over samples find out about the inputs of layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgevlm.calibration.histogram import Histogram
from edgevlm.toolkit.ops.vocabulary import Array

Read = Callable[[Any], Array]


@dataclass
class Ranges:
    """A histogram of what enters each layer of `wanted`; layers with one input share one.

    read: from a tensor of the ops to an array.
    """

    wanted: Collection[str]
    read: Read
    _histograms: dict[str, Histogram] = field(default_factory=dict)
    _shared: dict[str, str] = field(default_factory=dict)
    _last: tuple[Any, str] = (None, "")

    def see(self, path: str, x: Any) -> None:
        """Count an input."""
        if path not in self.wanted:
            return
        seen, first = self._last
        if seen is x:  # q, k and v have the same input
            self._shared[path] = first
            return
        self._last = (x, path)
        self._histograms.setdefault(path, Histogram()).add(self.read(x), path)

    def histograms(self) -> dict[str, Histogram]:
        """Of each layer that was reached, by path."""
        shared = {path: self._histograms[first] for path, first in self._shared.items()}
        return {**self._histograms, **shared}

    def arrays(self) -> dict[str, Array]:
        found = dict[str, Array]()
        for path, h in self._histograms.items():
            found["counts " + path] = h.counts
            found["sizes " + path] = np.array([h.limit, float(h.zeros), h.largest])
        for path, first in self._shared.items():
            found["shared " + path] = np.frombuffer(first.encode(), np.uint8)
        return found

    def fill(self, arrays: Mapping[str, Array]) -> None:
        for key, array in arrays.items():
            kind, path = key.split(" ", 1)
            if kind == "counts":
                limit, zeros, largest = (float(x) for x in arrays["sizes " + path])
                self._histograms[path] = Histogram(np.array(array), limit, int(zeros), largest)
            elif kind == "shared":
                self._shared[path] = array.tobytes().decode()


@dataclass
class Channels:
    """max|x| of each channel of what enters the layers of `wanted`, by path."""

    wanted: Collection[str]
    read: Read
    largest: dict[str, Array] = field(default_factory=dict)

    def see(self, path: str, x: Any) -> None:
        """Look at an input."""
        if path in self.wanted:
            values = np.abs(self.read(x))
            found = values.reshape(-1, values.shape[-1]).max(0)
            self.largest[path] = np.maximum(self.largest.get(path, found), found)

    def arrays(self) -> dict[str, Array]:
        return dict(self.largest)

    def fill(self, arrays: Mapping[str, Array]) -> None:
        self.largest.update({path: np.array(x) for path, x in arrays.items()})
