"""A tower's blocks in 4 bits, the worst of their linears in 8: as many as the budget asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from edgevlm.calibration import rounding, smooth, weight_only
from edgevlm.calibration.appraise import Whole
from edgevlm.calibration.calibrator import AIM
from edgevlm.calibration.many import Many
from edgevlm.calibration.pictures import Progress, Sample
from edgevlm.calibration.rounding import Rounded
from edgevlm.calibration.samples import Settings, block_of
from edgevlm.calibration.towers.chain import TowerChain
from edgevlm.calibration.unfinished import Unfinished
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.ops.shape_ops import ShapeOps, Spec, Specs
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.blockwise import LINEAR, StorageFormat
from edgevlm.toolkit.quantization.coded import Coded
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule
from edgevlm.toolkit.vlm import components, cost
from edgevlm.toolkit.vlm.components import Component
from edgevlm.toolkit.vlm.cost import image_axes
from edgevlm.toolkit.vlm.towers import Model

MOST_IN_8_BITS = 0.3  # of the weights of the blocks' linears
_STEPS = 2  # from none to that many
_VALUES = 1 << 27  # of the largest op, of all images that weights are rounded with

Measure = Callable[[Mapping[str, Array], PrecisionPlan], Whole]


@dataclass(frozen=True)
class Fit:
    """What came of it: the plan, the weights, what they cost; the keys that are kept in 8 bits;
    errors: of each linear of a block in 4 bits, by key.
    """

    plan: PrecisionPlan
    weights: Mapping[str, Array]
    whole: Whole
    in_8: tuple[str, ...]
    errors: Mapping[str, float]


class Rounds:
    """Everything is rounded and measured, each time with other linears in 8 bits.

    plan: that of all linears that do not get 4 bits.
    """

    def __init__(
        self,
        chain: TowerChain,
        plan: PrecisionPlan,
        settings: Settings,
        progress: Progress,
        kept: Unfinished,
    ) -> None:
        """Raises ConfigError for a tower none of whose blocks' linears can have 4 bits."""
        self._chain, self._part, self._settings = chain, chain.parts[0], settings
        self._axes = image_axes(chain.model, 1, 1)
        self._plan = replace(plan, method=settings.method)
        self._progress, self._kept = progress, kept
        found = linears_of_blocks(self._part, self._axes)
        self.paths = {key: path for key, path in found.items() if plan.at(path) != "float"}
        self._sizes = {key: math.prod(self._part.shapes[key]) for key in self.paths}
        if not self.paths:
            raise ConfigError(
                f"no linear of {self._part.name}'s blocks can have 4 bits",
                hint="inputs are multiples of 16; leave --keep-float out, or take --to int8",
            )

    def until_it_fits(
        self,
        weights: Mapping[str, Array],
        given: tuple[Sample, ...],
        budget: float,
        measure: Measure,
    ) -> Fit:
        """Round everything to 4 bits, then the linears with the largest errors to 8, until the
        budget holds: each time anew, as every linear makes up for those before it.
        """
        pixels = Many(self._chain.pixels(sample)[None] for sample in self._few(given))
        total, best = sum(self._sizes.values()), None
        errors: Mapping[str, float] = {}
        for step in range(_STEPS + 1):
            worst = sorted(self.paths, key=lambda key: -errors.get(key, 0))
            most = MOST_IN_8_BITS * step / _STEPS * total
            in_8 = weight_only.up_to(worst, self._sizes, most)
            self._progress(f"{len(in_8)} of {len(self.paths)} linears in 8 bits")
            found = self._rounded(weights, pixels, in_8, self._kept.part(f"round {step}"))
            errors = errors or {key: found.errors[key] for key in self.paths}
            fit = self._fit(weights, found, in_8, errors, measure)
            if best is None or fit.whole.cost < best.whole.cost:
                best = fit
            if best.whole.cost <= AIM * budget:
                break
        assert best is not None
        return replace(best, errors=errors)

    def share_4_bits(self, in_8: tuple[str, ...]) -> float:
        """Of the weights of the blocks' linears."""
        return 1 - sum(self._sizes[key] for key in in_8) / sum(self._sizes.values())

    def _few(self, given: tuple[Sample, ...]) -> list[Sample]:
        """As many images as fit into memory at once, spread evenly."""
        counted = cost.count(self._part, self._axes)
        largest = max(one.activation_elements for one in counted.costs)
        most = min(len(given), max(_VALUES // largest, 4))
        return [given[i] for i in np.linspace(0, len(given) - 1, most).astype(np.int64)]

    def _rounded(
        self, weights: Mapping[str, Array], pixels: Many, in_8: tuple[str, ...], kept: Unfinished
    ) -> Rounded:
        settings = self._settings
        storage = StorageFormat(4, True, LINEAR[4].suffix, settings.block, settings.zero_points)
        storages = {
            key: weight_only.fitting(storage, self._part.shapes[key][0])
            for key in self.paths
            if key not in in_8
        }
        given = (self._part, weights, pixels, storages, settings.method)
        return rounding.rounded(*given, self._progress, kept, self._axes)

    def _fit(
        self,
        weights: Mapping[str, Array],
        found: Rounded,
        in_8: tuple[str, ...],
        errors: Mapping[str, float],
        measure: Measure,
    ) -> Fit:
        links = rounding.links(self._part, found.codes, self._axes)
        linked = [link for link in links if link.source in found.scales]
        scaled = smooth.smoothed(weights, found.scales, linked) if linked else weights
        made = Coded(scaled, found.codes)
        zero_points, block = self._settings.zero_points, block_of(self._settings)
        rules = tuple(
            Rule(
                self.paths[key],
                "int4_weights",
                block,
                zero_points and found.codes[key].storage.zero_points,
            )
            for key in found.codes
        )
        plan = replace(self._plan, rules=(*rules, *self._plan.rules))
        return Fit(plan, made, measure(made, plan), in_8, errors)


def plan_in_4_bits(model: Model) -> PrecisionPlan:
    """All linears of a tower's blocks in 4 bits, all others with their inputs by rows: what
    `Rounds` begins with.
    """
    part = components.components(model)[0]
    found = linears_of_blocks(part, image_axes(model, 1, 1))
    rules = tuple(Rule(path, "int4_weights", 32) for path in found.values())
    return PrecisionPlan("int8_rows", rules, method="round to nearest")


class _Seen(Wrapper[Spec]):
    """Runs a component over shapes, and notes the linears inside of blocks: paths by key."""

    def __init__(self, component: str) -> None:
        super().__init__(cast(Any, ShapeOps()), component)
        self.found: dict[str, str] = {}
        self._inside = False

    def block(self, function: Callable[..., Any], w: Weights[Spec], *args: Any) -> Any:
        self._inside = True
        found = super().block(function, w, *args)
        self._inside = False
        return found

    def linear(self, x: Spec, w: Weights[Spec]) -> Spec:
        if self._inside:
            self.found[w.key("weight")] = self.path_of(w)
        return self.inner.linear(x, w)


def linears_of_blocks(part: Component, axes: Mapping[str, int]) -> dict[str, str]:
    """The paths, by the key of its weight, of every linear of a block that has blocks of inputs."""
    seen: Any = _Seen(part.name)
    part.forward(seen, Weights(Specs(part.shapes)), cost.inputs(part, axes))
    found: dict[str, str] = seen.found
    return {
        key: path
        for key, path in found.items()
        if key in part.shapes and blockwise.block_of(part.shapes[key][0]) is not None
    }
