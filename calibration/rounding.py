"""Samples go through a language model or a tower, and its linears are rounded as they are reached.

Each linear gets the inputs that the rounded ones before it give, so layers make up for errors
before them as well as for their own. Beside them goes the float model, one layer at a time, which
says what they are to give.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from edgevlm.calibration import awq, gptq, smooth, steps
from edgevlm.calibration.kept_codes import KeptCodes, KeptLayers, Made
from edgevlm.calibration.many import Many, ManyOps, hidden
from edgevlm.calibration.smooth import Link
from edgevlm.calibration.unfinished import Unfinished
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.quantization.blockwise import StorageFormat
from edgevlm.toolkit.quantization.coded import Codes
from edgevlm.toolkit.vlm.components import Component

Method = Literal["rtn", "awq", "gptq", "awq+gptq"]
METHODS: tuple[Method, ...] = get_args(Method)
_SCALES = "scales"
_SIZES = dict.fromkeys(("batch", "sequence", "context", "rows", "scored"), 1)
_Passed = Callable[[str], None]


@dataclass(frozen=True)
class Rounded:
    """What was found: codes, and the squared error of the outputs that each linear's own rounding
    causes over their size, both by key; scales by a link's source, see smooth.smoothed.
    """

    codes: Mapping[str, Codes]
    errors: Mapping[str, float]
    scales: Mapping[str, Array]


def rounded(
    lm: Component,
    weights: Mapping[str, Array],
    windows: Array | Many,
    storages: Mapping[str, StorageFormat],
    method: Method,
    progress: _Passed,
    kept: Unfinished | None = None,
    axes: Mapping[str, int] = _SIZES,
) -> Rounded:
    """The linears `storages` names, rounded by `method` with windows of ids [N, S], or the pixels
    of images. axes: any sizes that the component can run with.

    kept: where everything that is found is kept, and what an earlier run found with the same
    arguments. Raises CalibrationError naming a linear whose inputs say nothing.
    """
    linked = links(lm, storages, axes) if "awq" in method else []
    tower = isinstance(windows, Many)
    ops = _Round(storages, method, linked, progress, kept or Unfinished(), tower=tower)
    if not ops.complete:
        hidden(lm, ops, weights, windows)
    return ops.found


def links(lm: Component, linears: Collection[str], axes: Mapping[str, int] = _SIZES) -> list[Link]:
    """Where scales can go: inputs that nothing but such linears read."""
    found = smooth.links(lm, axes)
    return [link for link in found if all(key in linears for key in link.linears)]


class _See(ManyOps):
    """Notes what enters every linear, by the key of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, Many] = {}

    def linear(self, x: Many, w: Weights[Any]) -> Many:
        self.inputs[w.key("weight")] = x
        return super().linear(x, w)


class _Round(ManyOps):
    """Rounds each linear as soon as the samples reach it.

    Scales, codes and what leaves a layer are taken from an earlier run where it found them. All
    else of a layer is computed again: it is the same, as it follows from those.
    """

    def __init__(
        self,
        storages: Mapping[str, StorageFormat],
        method: Method,
        linked: Sequence[Link],
        progress: _Passed,
        kept: Unfinished,
        *,
        tower: bool,
    ) -> None:
        super().__init__()
        self._tower = tower
        self._storages, self._method, self._links = storages, method, linked
        self._progress, self._kept = progress, kept
        self._codes, self._layers = KeptCodes(kept), KeptLayers(kept)
        names = {link.source: link.source + _SCALES for link in linked}
        self._scales = {
            source: np.array(kept.get(name)[_SCALES])
            for source, name in names.items()
            if kept.has(name)
        }
        self._left: Many | None = None  # what the layer before gave
        self._plain: Many | None = None  # what the float model has where a layer begins
        self._wanted: dict[str, Many] = {}  # inputs of this layer's linears in the float model
        self._seen: tuple[Many, gptq.Inputs] | None = None

    @property
    def complete(self) -> bool:
        """Whether an earlier run found everything."""
        return all(key in self._codes for key in self._storages)

    @property
    def found(self) -> Rounded:
        """What came out; codes are read when they are used."""
        codes = Made({key: partial(self._codes.__getitem__, key) for key in self._storages})
        errors = {key: self._codes.error(key) for key in self._storages}
        return Rounded(codes, errors, self._scales)

    def block(self, function: Callable[..., Any], w: Weights[Any], *args: Any) -> Any:
        """A layer: from the first argument, which goes through all of them, to the next; that of a
        decoder gives its part of the KV cache too, which nobody reads.

        What stands between two blocks of a tower (a new stage) is rounded, and where it did
        anything the float model begins again with what that gave.
        """
        if args[0] is not self._left:
            self._plain = None
        plain = [] if self._method == "rtn" else [self._plain or args[0]]
        passed = self._layers.passed([args[0], *plain])
        if passed is not None:
            self._left, self._plain = passed[0], passed[-1]
            return passed[0] if self._tower else (passed[0], (None, None))
        if plain:
            see = _See()
            plain[0] = _stream(function(see, w, plain[0], *args[1:]))
            self._plain, self._wanted = plain[0], see.inputs
            w = self._scaled(w)
        found = function(self, w, *args)
        self._left = _stream(found)
        self._layers.leaves([self._left, *plain])
        return found

    def _scaled(self, w: Weights[Any]) -> Weights[Any]:
        """The layer's weights, and what its linears are to get, with the scales found for it."""
        here = [link for link in self._links if link.source.startswith(w.key(""))]
        for link in here:
            inputs = self._wanted[link.linears[0]]
            if link.source not in self._scales:
                self._search(link, inputs, w.tensors)
            divided = Many(x / self._scales[link.source] for x in inputs)
            self._wanted |= dict.fromkeys(link.linears, divided)
        return replace(w, tensors=smooth.smoothed(w.tensors, self._scales, here)) if here else w

    def _search(self, link: Link, inputs: Many, weights: Mapping[str, Array]) -> None:
        """Find the scales of a link, and keep them."""
        costs = self._costs(inputs, link)
        found = awq.scales(link, inputs, costs, weights, self._storages)
        self._kept.put(link.source + _SCALES, {_SCALES: found})
        self._scales[link.source] = found
        self._progress(
            f"{link.paths[0]}: input scaled by 1/{found.max():.2g} to 1/{found.min():.2g}"
        )

    def _costs(self, inputs: Many, link: Link) -> Array:
        """What a change of each channel's weights costs: by the size of its input, or by what is
        left of that once the channels after it have made up for it.
        """
        known = gptq.Inputs(gptq.second_moments(inputs, link.paths[0]), link.paths[0])
        if "gptq" not in self._method:
            return np.diag(known.moments)
        block = self._storages[link.linears[0]].block_in(len(known.moments))
        assert block is not None
        return known.costs(block)

    def linear(self, x: Many, w: Weights[Any]) -> Many:
        key = w.key("weight")
        if key not in self._storages:
            return super().linear(x, w)
        if key not in self._codes:
            self._codes.add(key, *self._rounded(x, w))
            number = list(self._storages).index(key) + 1
            error = self._codes.error(key)
            self._progress(f"{w.path} ({number} of {len(self._storages)}): error {error:.2g}")
        return super().linear(x, w.replacing(weight=self._codes[key].floats()))

    def _rounded(self, x: Many, w: Weights[Any]) -> tuple[Codes, float]:
        """The codes of a linear, and their error."""
        key = w.key("weight")
        matrix, storage = np.asarray(w["weight"], np.float32), self._storages[key]
        inputs = self._inputs(x, w)
        if "gptq" in self._method:
            found = gptq.compensated(matrix, inputs, storage)
            return found.codes, found.error
        energy = np.diag(inputs.moments) if self._method == "awq" else None
        made = steps.nearest(matrix, storage, energy)
        return made, gptq.output_error(matrix, made.floats(), inputs.moments)

    def _inputs(self, x: Many, w: Weights[Any]) -> gptq.Inputs:
        """What is known of an input, and of how far the float model's is from it."""
        if self._seen is None or self._seen[0] is not x:  # q, k and v have the same input
            wanted = self._wanted.get(w.key("weight")) if "gptq" in self._method else None
            shifted = None if wanted is None else gptq.shift(x, wanted)
            self._seen = x, gptq.Inputs(gptq.second_moments(x, w.path), w.path, shifted)
        return self._seen[1]


def _stream(found: Any) -> Many:
    """What goes on to the next layer, of what one gives."""
    stream: Many = found if isinstance(found, Many) else found[0]
    return stream
