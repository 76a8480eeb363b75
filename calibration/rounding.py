"""Samples go through a language model, and its linears are rounded as they are reached.

Each linear gets the inputs that the rounded ones before it give, so layers make up for errors
before them as well as for their own. Beside them goes the float model, one layer at a time, which
says what they are to give.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from edgevlm.calibration import awq, gptq, smooth, steps
from edgevlm.calibration.many import Many, ManyOps, hidden
from edgevlm.calibration.smooth import Link
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.quantization.blockwise import StorageFormat
from edgevlm.toolkit.quantization.coded import Codes
from edgevlm.toolkit.vlm.components import Component

Method = Literal["rtn", "awq", "gptq", "awq+gptq"]
METHODS: tuple[Method, ...] = get_args(Method)
_SIZES = dict.fromkeys(("batch", "sequence", "context", "rows", "scored"), 1)
_Passed = Callable[[str], None]


@dataclass
class Rounded:
    """What was found: codes, and the squared error of the outputs that each linear's own rounding
    causes over their size, both by key; scales by a link's source, see smooth.smoothed.
    """

    codes: dict[str, Codes] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    scales: dict[str, Array] = field(default_factory=dict)


def rounded(
    lm: Component,
    weights: Mapping[str, Array],
    windows: Array,
    storages: Mapping[str, StorageFormat],
    method: Method,
    progress: _Passed,
) -> Rounded:
    """The linears `storages` names, rounded by `method` with windows of ids [N, S].

    Raises CalibrationError naming a linear whose inputs say nothing.
    """
    linked = links(lm, storages) if "awq" in method else []
    ops = _Round(storages, method, linked, progress)
    hidden(lm, ops, weights, windows)
    return ops.found


def links(lm: Component, linears: Collection[str]) -> list[Link]:
    """Where scales can go: inputs that nothing but such linears read."""
    found = smooth.links(lm, _SIZES)
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
    """Rounds each linear as soon as the samples reach it."""

    def __init__(
        self,
        storages: Mapping[str, StorageFormat],
        method: Method,
        linked: Sequence[Link],
        progress: _Passed,
    ) -> None:
        super().__init__()
        self.found = Rounded()
        self._storages, self._method, self._links = storages, method, linked
        self._progress = progress
        self._plain: Many | None = None  # what the float model has where a layer begins
        self._wanted: dict[str, Many] = {}  # inputs of this layer's linears in the float model
        self._seen: tuple[Many, gptq.Inputs] | None = None

    def block(self, function: Callable[..., Any], w: Weights[Any], *args: Any) -> Any:
        """A layer, whose first argument is the tensor that goes through all of them."""
        if self._method != "rtn":
            see, plain = _See(), args[0] if self._plain is None else self._plain
            self._plain, *_ = function(see, w, plain, *args[1:])
            self._wanted = see.inputs
            w = self._scaled(w)
        return function(self, w, *args)

    def _scaled(self, w: Weights[Any]) -> Weights[Any]:
        """The layer's weights, and what its linears are to get, with the scales found for it."""
        here = [link for link in self._links if link.source.startswith(w.key(""))]
        found = dict[str, Array]()
        for link in here:
            inputs = self._wanted[link.linears[0]]
            costs = self._costs(inputs, link)
            found[link.source] = awq.scales(link, inputs, costs, w.tensors, self._storages)
            divided = Many(x / found[link.source] for x in inputs)
            self._wanted |= dict.fromkeys(link.linears, divided)
        self.found.scales |= found
        return replace(w, tensors=smooth.smoothed(w.tensors, found, here)) if found else w

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
        matrix, storage = np.asarray(w["weight"], np.float32), self._storages[key]
        inputs = self._inputs(x, w)
        if "gptq" in self._method:
            found = gptq.compensated(matrix, inputs, storage)
            made, error = found.codes, found.error
        else:
            energy = np.diag(inputs.moments) if self._method == "awq" else None
            made = steps.nearest(matrix, storage, energy)
            error = gptq.output_error(matrix, made.floats(), inputs.moments)
        self.found.codes[key], self.found.errors[key] = made, error
        self._progress(
            f"{w.path} ({len(self.found.codes)} of {len(self._storages)}): error {error:.2g}"
        )
        return super().linear(x, w.replacing(weight=made.floats()))

    def _inputs(self, x: Many, w: Weights[Any]) -> gptq.Inputs:
        """What is known of an input, and of how far the float model's is from it."""
        if self._seen is None or self._seen[0] is not x:  # q, k and v have the same input
            wanted = self._wanted.get(w.key("weight")) if "gptq" in self._method else None
            shifted = None if wanted is None else gptq.shift(x, wanted)
            self._seen = x, gptq.Inputs(gptq.second_moments(x, w.path), w.path, shifted)
        return self._seen[1]
