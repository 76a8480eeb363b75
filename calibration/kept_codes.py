"""Codes that need not be in memory: on disk while the rest is calibrated, or made when used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from edgevlm.calibration.many import Many
from edgevlm.calibration.unfinished import Unfinished
from edgevlm.toolkit.quantization.blockwise import StorageFormat
from edgevlm.toolkit.quantization.coded import Codes
from edgevlm.toolkit.strict import from_plain

_IN_MEMORY = 1 << 28  # bytes: codes of small models are not read from disk again
_LAYER = "hidden states"


class Made(Mapping[str, Codes]):
    """Codes by key, each made when it is used, and not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], Codes]]) -> None:
        self._makers = makers

    def __getitem__(self, key: str) -> Codes:
        return self._makers[key]()

    def __contains__(self, key: object) -> bool:
        return key in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class KeptCodes:
    """Codes by key, and the error of each, written to the folder of `kept` where it has one.

    What an earlier run found is there too.
    """

    def __init__(self, kept: Unfinished) -> None:
        self._kept = kept
        self._memory: dict[str, Codes] = {}
        self._errors: dict[str, float] = {}
        self._nbytes = 0

    def add(self, key: str, codes: Codes, error: float) -> None:
        """Keep codes and their error."""
        tensors = {"codes": codes.codes, "scales": codes.scales, "zero_points": codes.zero_points}
        arrays = {name: x for name, x in tensors.items() if x is not None}
        storage = np.frombuffer(json.dumps(asdict(codes.storage)).encode(), np.uint8)
        self._kept.put(key, {**arrays, "storage": storage, "error": np.array([error])})
        self._nbytes += sum(x.nbytes for x in arrays.values())
        if self._kept.folder is None or self._nbytes <= _IN_MEMORY:
            self._memory[key] = codes
        self._errors[key] = error

    def __contains__(self, key: str) -> bool:
        return key in self._errors or self._kept.has(key)

    def __getitem__(self, key: str) -> Codes:
        if key in self._memory or not self._kept.has(key):
            return self._memory[key]
        arrays = self._kept.get(key)
        stated = json.loads(arrays["storage"].tobytes())
        storage = from_plain(StorageFormat, stated, f"what was kept of {key}")
        return Codes(storage, arrays["codes"], arrays["scales"], arrays.get("zero_points"))

    def error(self, key: str) -> float:
        """The error of codes."""
        return self._errors[key] if key in self._errors else float(self._kept.get(key)["error"][0])


class KeptLayers:
    """Where samples were in the model when hidden states were kept the last time."""

    def __init__(self, kept: Unfinished) -> None:
        self._kept = kept.part("samples")  # with a clock that codes do not put back
        self._done = 0
        self._arrays = self._kept.get(_LAYER) if self._kept.has(_LAYER) else None
        self._until = int(self._arrays["layers"][0]) if self._arrays else 0

    def passed(self, streams: Sequence[Many]) -> list[Many] | None:
        """What leaves the next layer, in which `streams` enter, if an earlier run was beyond it:
        only where that run ended is it what the layer gives.
        """
        if self._done >= self._until:
            return None
        self._done += 1
        if self._done < self._until or self._arrays is None:
            return list(streams)
        return [x.split(np.array(self._arrays[f"{i}"])) for i, x in enumerate(streams)]

    def leaves(self, streams: Sequence[Many]) -> None:
        """A layer was run, and gives `streams`: the samples of one model, or of two of them."""
        self._done += 1
        if self._kept.folder is not None and self._kept.due():
            arrays = {f"{i}": x.joined() for i, x in enumerate(streams)}
            self._kept.put(_LAYER, {**arrays, "layers": np.array([self._done], np.int64)})
