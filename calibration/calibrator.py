"""Passes over samples that static INT8 and FP8 need: channels, ranges, biases, errors.

A few samples at a time go through the float model and leave sums: memory grows neither with their
number nor with the model's layers, and what was found is kept between two runs of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from edgevlm.calibration import reads, smooth
from edgevlm.calibration.appraise import Appraise, Whole
from edgevlm.calibration.chain import Arithmetic, Chain, Passage
from edgevlm.calibration.histogram import ranges_of
from edgevlm.calibration.observed import Channels, Ranges
from edgevlm.calibration.pictures import Chosen, Progress, Sample
from edgevlm.calibration.samples import STATICS, Settings
from edgevlm.calibration.static_plan import FLOAT_STEPS, layers_of, without_worst
from edgevlm.calibration.towers.chain import TowerChain
from edgevlm.calibration.unfinished import Found, Unfinished
from edgevlm.toolkit.checkpoints.layouts.source import Source, TowerSource
from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops.vocabulary import Array, Ops
from edgevlm.toolkit.ops.wrappers import Observe
from edgevlm.toolkit.quantization import static
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.quantization.quantize import Quantize
from edgevlm.toolkit.vlm.components import Component
from edgevlm.toolkit.vlm.cost import image_axes
from edgevlm.toolkit.vlm.towers import language_model

TOGETHER = 4  # samples: more gain little speed, and take memory
AIM = 0.8  # of the budget: the samples that choose favour what they choose
_CORRECTED_ON = 16  # samples that bias correction takes
_ROUNDED_INPUTS = ("int8", "int8_rows", "fp8")

Store = Mapping[str, Mapping[str, Array]]
Biases = Mapping[str, Mapping[str, Array]]
AnyChain = Chain | TowerChain
S = TypeVar("S", bound=Source | TowerSource)


@dataclass(frozen=True)
class Measured(Generic[S]):
    """The source with its plan and changed weights. first: what all layers rounded cost; whole:
    what the plan costs; ranges: of all layers.
    """

    source: S
    first: Whole
    whole: Whole
    ranges: Mapping[str, float]
    smoothed: int
    corrected: int


class Calibrator:
    """Runs samples through a model, and finds out what static INT8 or FP8 needs to know."""

    def __init__(
        self,
        chain: AnyChain,
        arithmetic: Arithmetic,
        settings: Settings,
        progress: Progress,
        kept: Unfinished | None = None,
    ) -> None:
        self._chain = chain
        self._arithmetic = arithmetic
        self._settings = settings
        self._progress = progress
        self._kept = kept or Unfinished()
        self._said: dict[int, Array] = {}  # the float model's answers, by the sample's id

    def run(self, source: S, plan: PrecisionPlan, chosen: Chosen) -> Measured[S]:
        """Ranges, changed weights, and what that costs on samples that it was not made from."""
        weights: Store = source.weights
        smoothed = 0
        if self._settings.smooth is not None:
            weights, smoothed = self.smoothed(weights, plan, chosen.calibrating)
        plan = replace(plan, ranges=self.ranges(weights, plan, chosen.calibrating))
        biases: Biases = {}
        if self._settings.bias_correction:
            biases = self._biases(weights, plan, chosen.calibrating)
        first = self._measured("errors", weights, biases, plan, chosen.held_out, layers=True)
        best, whole = self._within_budget(weights, biases, plan, chosen.held_out, first)
        biases = _rounded(biases, best)
        final = {name: _with(own, biases.get(name, {})) for name, own in weights.items()}
        corrected = sum(map(len, biases.values()))
        made = replace(source, plan=best, weights=final)
        return Measured(made, first, whole, plan.ranges, smoothed, corrected)

    def ranges(
        self, weights: Store, plan: PrecisionPlan, given: Sequence[Sample]
    ) -> dict[str, float]:
        """The range of each layer that the plan rounds.

        Raises CalibrationError naming a layer whose input is never reached, always zero, or no
        number.
        """
        expected = [p for p in layers_of(self._chain.model).flops if plan.at(p) != "float"]
        found = Ranges(frozenset(expected), self._arithmetic.read)
        self._observe("ranges", weights, plan, given, found)
        histograms = found.histograms()
        for path in expected:
            if path not in histograms:
                raise CalibrationError(
                    f"no sample reaches {path}", hint="give samples with images and prompts"
                )
        form = static.FORMS[STATICS[self._settings.to]]
        found_by = {path: histograms[path] for path in expected}
        return ranges_of(found_by, self._settings.range, form)

    def _observe(
        self,
        what: str,
        weights: Store,
        plan: PrecisionPlan,
        given: Sequence[Sample],
        found: Ranges | Channels,
    ) -> None:
        def wrap(ops: Ops[Any], part: Component) -> Any:
            return Observe(ops, part.name, found.see)

        self._each(what, given, found, self._run(Passage(weights, self._arithmetic, wrap), plan))

    def _run(self, by: Passage, plan: PrecisionPlan) -> Callable[[Sequence[Sample]], None]:
        """Samples through the model, as far as layers of the plan are."""
        language = _reaches(plan, self._chain)

        def run(some: Sequence[Sample]) -> None:
            self._chain.run_all(some, by, language=language)

        return run

    def _each(
        self,
        what: str,
        given: Sequence[Sample],
        found: Found,
        run: Callable[[Sequence[Sample]], None],
    ) -> None:
        """Run a few samples after the other, from where an earlier pass of this name ended."""
        for start in range(self._kept.take_up(what, found), len(given), TOGETHER):
            some = given[start : start + TOGETHER]
            end = start + len(some)
            self._progress(f"{what}: samples {start + 1} to {end} of {len(given)}")
            run(some)
            self._kept.keep(what, found, end, last=end == len(given))

    def smoothed(
        self, weights: Store, plan: PrecisionPlan, given: Sequence[Sample]
    ) -> tuple[Store, int]:
        """The weights with outliers moved into them, and how many places changed."""
        alpha = self._settings.smooth
        assert alpha is not None
        axes = image_axes(self._chain.model, 1, 1) | {"sequence": 1, "context": 1}
        linked = {part.name: smooth.links(part, axes) for part in self._chain.parts}
        wanted = {
            link.paths[0]
            for links in linked.values()
            for link in links
            if any(plan.at(path) in _ROUNDED_INPUTS for path in link.paths)
        }
        seen = Channels(wanted, self._arithmetic.read)
        self._observe("channels", weights, plan, given, seen)
        largest = seen.largest
        changed, total = dict(weights), 0
        for name, links in linked.items():
            reached = [link for link in links if link.paths[0] in largest]
            if not reached:
                continue
            found = {
                link.source: smooth.scales(link, largest[link.paths[0]], weights[name], alpha)
                for link in reached
            }
            changed[name] = smooth.smoothed(weights[name], found, reached)
            total += len(reached)
        return changed, total

    def _errors(self, weights: Store, biases: Biases, plan: PrecisionPlan, whole: Whole) -> Passage:
        """The float model, each layer compared with what it is in the plan."""

        def wrap(ops: Ops[Any], part: Component) -> Appraise:
            own = {k: self._arithmetic.load(b) for k, b in biases.get(part.name, {}).items()}
            read, store = self._arithmetic.read, weights.get(part.name, {})
            return Appraise(ops, part.name, plan, store, read, whole.layers, own)

        return Passage(weights, self._arithmetic, wrap)

    def _biases(
        self, weights: Store, plan: PrecisionPlan, given: Sequence[Sample]
    ) -> dict[str, dict[str, Array]]:
        """Biases with the mean error of their outputs added, by component and key."""
        seen = Whole()
        by = self._errors(weights, {}, plan, seen)
        some = given[:: -(-len(given) // _CORRECTED_ON)]
        self._each("biases", some, seen, self._run(by, plan))
        found: dict[str, dict[str, Array]] = {}
        for path, error in seen.layers.items():
            name, inner = path.split("/", 1)
            key = inner.replace("/", ".") + ".bias"
            if key in weights[name]:
                bias = weights[name][key].astype(np.float32) + error.shift / error.rows
                found.setdefault(name, {})[key] = bias.astype(np.float32)
        return found

    def _measured(
        self,
        what: str,
        weights: Store,
        biases: Biases,
        plan: PrecisionPlan,
        held: Sequence[Sample],
        *,
        layers: bool,
    ) -> Whole:
        """The model in this plan beside the float model. layers: each layer by itself too."""
        whole = Whole()
        plain = Passage(weights, self._arithmetic)
        if layers:
            plain = self._errors(weights, biases, plan, whole)
        final = {name: _with(own, biases.get(name, {})) for name, own in weights.items()}

        def wrap(ops: Ops[Any], part: Component) -> Any:
            return Quantize(ops, part.name, plan, final.get(part.name, {}).__getitem__)

        rounded = Passage(final, self._arithmetic, wrap)

        def run(some: Sequence[Sample]) -> None:
            answers = self._answers(weights, some)
            both = (self._chain.run_all(some, by, answers=answers) for by in (plain, rounded))
            for sample, a, b in zip(some, *both, strict=True):
                whole.add(a, b, reads.following(sample))

        self._each(what, held, whole, run)
        return whole

    def _answers(self, weights: Store, some: Sequence[Sample]) -> list[Array]:
        """The float model's, which every plan is compared with."""
        if id(some[0]) not in self._said:
            said = self._chain.answered(some, Passage(weights, self._arithmetic))
            self._said |= {id(sample): own for sample, own in zip(some, said, strict=True)}
        return [self._said[id(sample)] for sample in some]

    def _within_budget(
        self,
        weights: Store,
        biases: Biases,
        plan: PrecisionPlan,
        held: Sequence[Sample],
        first: Whole,
    ) -> tuple[PrecisionPlan, Whole]:
        """Leave the layers with the largest errors in float, until the budget holds."""
        best, budget = (plan, first), self._settings.budget
        worst = sorted(first.layers, key=lambda path: -first.layers[path].compared.relative_rms)
        for step in range(1, FLOAT_STEPS + 1):
            if budget is None or best[1].cost <= AIM * budget:
                break
            mixed = without_worst(plan, worst, layers_of(self._chain.model), step)
            spared = len(plan.ranges) - len(mixed.ranges)
            what = f"errors {step + 1}, {spared} layers in float"
            own = _rounded(biases, mixed)
            whole = self._measured(what, weights, own, mixed, held, layers=False)
            if whole.cost < best[1].cost:
                best = (mixed, whole)
        return best


def _reaches(plan: PrecisionPlan, chain: AnyChain) -> bool:
    """Whether a layer of the language model is in the plan."""
    lm = language_model(chain.model)
    name = lm.name if lm else None
    paths = layers_of(chain.model).flops
    return any(plan.at(path) != "float" for path in paths if path.split("/")[0] == name)


def _rounded(biases: Biases, plan: PrecisionPlan) -> dict[str, dict[str, Array]]:
    """Those of layers that the plan rounds: the others make no error."""
    found: dict[str, dict[str, Array]] = {}
    paths = {path.replace("/", "."): path for path in plan.ranges}
    for name, own in biases.items():
        kept = {k: b for k, b in own.items() if f"{name}.{k.removesuffix('.bias')}" in paths}
        if kept:
            found[name] = kept
    return found


def _with(weights: Mapping[str, Array], biases: Mapping[str, Array]) -> Mapping[str, Array]:
    """The weights with these biases."""
    if not biases:
        return weights
    return smooth.Changed(weights, {k: lambda _, b=b: b for k, b in biases.items()})  # type: ignore[misc]
