"""Calibration of vision towers by themselves: images are all that they see.

Static INT8 as for whole models; weights in 8 bits with their inputs by rows, outliers moved by what
images show; the blocks' weights in 4 bits. What that costs is how far embeddings of held-out images
turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.calibration import samples, unsampled, weight_only
from edgevlm.calibration.appraise import Whole
from edgevlm.calibration.calibrator import TOGETHER, Calibrator
from edgevlm.calibration.chain import Arithmetic, Passage, in_numpy
from edgevlm.calibration.pictures import Chosen, Given, Progress, gather
from edgevlm.calibration.samples import STATICS, Settings
from edgevlm.calibration.static import Interpreter, LayerCost, samples_sha256
from edgevlm.calibration.static_plan import layers_of, plan_of, share
from edgevlm.calibration.towers import golden
from edgevlm.calibration.towers.chain import FEATURES, TowerChain
from edgevlm.calibration.towers.rounds import Rounds
from edgevlm.calibration.towers.rows import RowQuantized
from edgevlm.calibration.unfinished import Unfinished
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options, TowerSource
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.ops.vocabulary import Array, Ops
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.vlm.components import Component
from edgevlm.toolkit.vlm.cost import count, image_axes, weight_bits
from edgevlm.toolkit.vlm.towers import TowerConfig

BUDGET = 0.01  # of weights in 4 bits, unless another is given: a cosine of 0.99


@dataclass(frozen=True)
class Rounded:
    """A linear in 4 bits, or kept in 8: the squared error of its outputs over their size that its
    own rounding to 4 bits makes, where all linears of blocks have 4 bits.
    """

    path: str
    bits: int
    error_4_bits: float


@dataclass(frozen=True)
class TowerCalibration:
    """What came out, on held-out images beside the float tower.

    cosine, lowest_cosine: of single embeddings, their mean and the lowest; relative_rms: of all
    together; features_cosine, features_rms: of what the last block gives. share: of the arithmetic,
    that with weights in codes; share_4_bits: of the weights of the blocks' linears. layers: of
    static INT8, those that cost most first; rounded: of 4 bits.
    """

    plan: PrecisionPlan
    component: str
    share: float
    cosine: float
    lowest_cosine: float
    relative_rms: float
    features_cosine: float
    features_rms: float
    held_out: int
    within_budget: bool
    layers: tuple[LayerCost, ...] = ()
    rounded: tuple[Rounded, ...] = ()
    share_4_bits: float = 0.0
    smoothed: int = 0
    corrected: int = 0
    dtype: str = "fp32"


def of_bundle(
    path: Path,
    out: Path,
    given: Given,
    settings: Settings,
    interpreter: Interpreter | None,
    progress: Progress,
    force: bool,
    kept: Unfinished,
) -> tuple[TowerSource, TowerCalibration]:
    """A float tower's bundle with calibrated weights, to be written to `out`.

    As edgevlm.calibration.calibrate.of_bundle, which calls it. Raises ToolkitError before any work
    where that cannot be.
    """
    samples.check(settings, tower=True)
    model = Bundle.open(path).model
    assert isinstance(model, TowerConfig)
    _check_given(given, model)
    bundle = samples.opened(path, out, force=force)
    plan = _plan(model, settings)
    chosen = gather(bundle, given, settings, progress)
    source = systems.load_any(path, Options())
    assert isinstance(source, TowerSource)
    arithmetic = Arithmetic(*interpreter) if interpreter else in_numpy()
    used = chosen.calibrating, chosen.held_out
    computes = type(arithmetic.ops).__name__
    kept.begin(progress, bundle.sha256, settings, *map(samples_sha256, used), computes)
    plan = replace(plan, samples=len(used[0]), samples_sha256=samples_sha256(used[0]))
    work = _Work(TowerChain(model), arithmetic, settings, progress, kept)
    make = {
        **dict.fromkeys(STATICS, work.static),
        "int8": work.by_rows,
        "int4": work.in_4_bits,
    }[settings.to]
    made, found = make(source, plan, chosen)
    return made, replace(found, dtype=bundle.manifest.dtype)


def _check_given(given: Given, model: TowerConfig) -> None:
    """Raise ConfigError for samples that a tower does not see, and for none."""
    foreign = {"--text": given.text, "--prompts": given.prompts}
    for option, file in foreign.items():
        if file is not None:
            raise ConfigError(
                f"{option} {file} is for models with a language model; {model.name} is a vision "
                "tower by itself",
                hint="calibrate it with --images FOLDER",
            )
    if given.images is None:
        raise ConfigError(
            f"{model.name} is a vision tower by itself: it is calibrated with images",
            hint="give --images FOLDER",
        )


def _plan(model: TowerConfig, settings: Settings) -> PrecisionPlan:
    """The plan that is begun with. Raises ConfigError for a glob that matches no layer."""
    if settings.to in STATICS:
        return plan_of(model, settings)
    by_rows = PrecisionPlan("int8_rows", method="round to nearest")
    return weight_only.keeping(by_rows, model, settings.keep_float)


@dataclass(frozen=True)
class _Work:
    """What every way needs."""

    chain: TowerChain
    arithmetic: Arithmetic
    settings: Settings
    progress: Progress
    kept: Unfinished

    @property
    def part(self) -> Component:
        """The tower."""
        return self.chain.parts[0]

    def _calibrator(self, settings: Settings) -> Calibrator:
        return Calibrator(self.chain, self.arithmetic, settings, self.progress, self.kept)

    def static(
        self, source: TowerSource, plan: PrecisionPlan, chosen: Chosen
    ) -> tuple[TowerSource, TowerCalibration]:
        """Ranges, SmoothQuant and bias correction, as for whole models."""
        found = self._calibrator(self.settings).run(source, plan, chosen)
        best = found.source.plan
        layers = tuple(
            LayerCost(path, found.ranges[path], e.compared.relative_rms, best.at(path) == "float")
            for path, e in found.first.layers.items()
        )
        result = replace(
            self._result(best, found.whole, len(chosen.held_out), self.settings.budget),
            share=share(self.part.name, layers_of(self.chain.model), best),
            layers=tuple(sorted(layers, key=lambda layer: -layer.error)),
            smoothed=found.smoothed,
            corrected=found.corrected,
        )
        drawn = source.weights, self.chain, self.arithmetic, self.kept
        return golden.with_picture(found.source, *drawn), result

    def by_rows(
        self, source: TowerSource, plan: PrecisionPlan, chosen: Chosen
    ) -> tuple[TowerSource, TowerCalibration]:
        """Every linear in 8 bits with its input by rows; outliers of images go into the weights."""
        alpha = self.settings.smooth or unsampled.ALPHA
        calibrator = self._calibrator(replace(self.settings, smooth=alpha))
        weights, smoothed = calibrator.smoothed(source.weights, plan, chosen.calibrating)
        whole = self.measured(source.weights, weights, plan, chosen)
        result = self._result(plan, whole, len(chosen.held_out), self.settings.budget)
        made = replace(source, plan=plan, weights=weights)
        return made, replace(result, smoothed=smoothed, share=self._share(plan))

    def in_4_bits(
        self, source: TowerSource, plan: PrecisionPlan, chosen: Chosen
    ) -> tuple[TowerSource, TowerCalibration]:
        """The blocks' linears in 4 bits, the worst of them and all others as `by_rows`."""
        rounds = Rounds(self.chain, plan, self.settings, self.progress, self.kept)
        plain, budget = source.weights, self.settings.budget
        budget = BUDGET if budget is None else budget

        def cost(weights: Mapping[str, Array], mixed: PrecisionPlan) -> Whole:
            return self.measured(plain, {self.part.name: weights}, mixed, chosen)

        given = plain[self.part.name], chosen.calibrating
        fit = rounds.until_it_fits(*given, budget, cost)
        result = self._result(fit.plan, fit.whole, len(chosen.held_out), budget)
        rounded = [
            Rounded(rounds.paths[key], 8 if key in fit.in_8 else 4, error)
            for key, error in fit.errors.items()
        ]
        made = replace(source, plan=fit.plan, weights={self.part.name: fit.weights})
        return made, replace(
            result,
            rounded=tuple(rounded),
            share_4_bits=rounds.share_4_bits(fit.in_8),
            share=self._share(fit.plan),
        )

    def measured(
        self,
        plain: Mapping[str, Mapping[str, Array]],
        rounded: Mapping[str, Mapping[str, Array]],
        plan: PrecisionPlan,
        chosen: Chosen,
    ) -> Whole:
        """Held-out images through the tower in float, and in these weights and this plan."""

        def wrap(ops: Ops[Any], part: Component) -> Any:
            return RowQuantized(ops, part.name, plan, rounded[part.name], self.arithmetic)

        whole, held = Whole(), chosen.held_out
        passages = Passage(plain, self.arithmetic), Passage(rounded, self.arithmetic, wrap)
        for start in range(0, len(held), TOGETHER):
            some = held[start : start + TOGETHER]
            self.progress(f"measuring: images {start + 1} to {start + len(some)} of {len(held)}")
            for a, b in zip(*(self.chain.run_all(some, by) for by in passages), strict=True):
                whole.add(a, b)
        return whole

    def _share(self, plan: PrecisionPlan) -> float:
        counted = count(self.part, image_axes(self.chain.model, 1, 1))
        low = sum(cost.flops for cost in counted.costs if weight_bits(cost, plan))
        return low / max(counted.flops, 1)

    def _result(
        self, plan: PrecisionPlan, whole: Whole, held_out: int, budget: float | None
    ) -> TowerCalibration:
        embedding, features = whole.components[self.part.name], whole.components[FEATURES]
        return TowerCalibration(
            plan,
            self.part.name,
            share=0.0,
            cosine=1 - whole.cost,
            lowest_cosine=1 - whole.most_turned,
            relative_rms=embedding.relative_rms,
            features_cosine=features.cosine,
            features_rms=features.relative_rms,
            held_out=held_out,
            within_budget=budget is None or whole.cost <= budget,
        )
