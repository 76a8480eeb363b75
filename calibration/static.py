"""Static INT8: ranges of what enters each layer, from samples; a plan, and what it costs.

Samples go through the float model one at a time, and leave counts: memory does not grow with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.calibration import samples, smooth
from edgevlm.calibration.appraise import Appraise, LayerError, Whole
from edgevlm.calibration.chain import Arithmetic, Chain, Passage, in_numpy
from edgevlm.calibration.histogram import Histogram, ranges_of
from edgevlm.calibration.pictures import Chosen, Given, Progress, Sample, gather
from edgevlm.calibration.samples import Settings
from edgevlm.calibration.static_plan import layers_of, plan_of, share
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.atomic import refuse_existing, refuse_source
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops.vocabulary import Array, Ops
from edgevlm.toolkit.ops.wrappers import Observe
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.quantization.quantize import Quantize
from edgevlm.toolkit.vlm.components import Component
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.toolkit.vlm.cost import image_axes

_CORRECTED_ON = 16  # samples that bias correction takes

Interpreter = tuple[Ops[Any], Callable[[Array], Any], Callable[[Any], Array]]
Store = Mapping[str, Mapping[str, Array]]


@dataclass(frozen=True)
class ComponentCost:
    """A component on held-out samples: cosine and relative rms error of its outputs to the float
    model's, errors of earlier components included; which share of its arithmetic is in INT8.
    """

    name: str
    cosine: float
    relative_rms: float
    share_int8: float


@dataclass(frozen=True)
class LayerCost:
    """A layer on held-out samples: relative rms error of its outputs, by its own rounding alone.

    range: the largest |x| that its input keeps.
    """

    path: str
    range: float
    error: float


@dataclass(frozen=True)
class StaticCalibration:
    """What came out.

    layers: those that cost most first. kl, same_top_1: of the logits, at `scored` positions of
    held-out samples. smoothed: how many inputs were; corrected: how many biases. dtype: of what the
    bundle has in float.
    """

    plan: PrecisionPlan
    components: tuple[ComponentCost, ...]
    layers: tuple[LayerCost, ...]
    kl: float
    same_top_1: float
    scored: int
    held_out: int
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
) -> tuple[Source, StaticCalibration]:
    """A float bundle's model with a plan for static INT8, to be written to `out`.

    interpreter: ops, from an array to their tensors, and back; None for NumPy's. Raises
    ToolkitError before any work where that cannot be.
    """
    samples.check(settings)
    arithmetic = Arithmetic(*interpreter) if interpreter else in_numpy()
    bundle = Bundle.open(path)
    samples.check_bundle(bundle)
    bundle.check_sizes()
    refuse_source(out, path)
    refuse_existing(out, force=force)
    plan = plan_of(bundle.model, settings)
    chosen = gather(bundle, given, settings, progress)
    _check_reach(bundle.model, plan, chosen)
    source = systems.load(path, Options())
    chain = Chain(bundle.model, bundle.tokenizer())
    for sample in (*chosen.calibrating, *chosen.held_out):
        chain.check(sample)
    made, found = Calibrator(chain, arithmetic, settings, progress).run(source, plan, chosen)
    return made, replace(found, dtype=bundle.manifest.dtype)


def _check_reach(model: ModelConfig, plan: PrecisionPlan, chosen: Chosen) -> None:
    """Raise CalibrationError naming a component that is to be in INT8 and sees no sample."""
    if any(sample.image is not None for sample in chosen.calibrating):
        return
    if not chosen.calibrating:
        raise CalibrationError("there are no samples", hint="give --images, --prompts or --text")
    for path in layers_of(model).flops:
        name = path.split("/")[0]
        if name != model.lm.name and plan.at(path) == "int8":
            raise CalibrationError(
                f"no sample reaches {name}: none has an image",
                hint=f"give --images FOLDER, or leave it in float: --keep-float '{name}/*'",
            )


class Calibrator:
    """Runs samples through a model, and finds out what static INT8 needs to know."""

    def __init__(
        self, chain: Chain, arithmetic: Arithmetic, settings: Settings, progress: Progress
    ) -> None:
        self._chain = chain
        self._arithmetic = arithmetic
        self._settings = settings
        self._progress = progress

    def run(
        self, source: Source, plan: PrecisionPlan, chosen: Chosen
    ) -> tuple[Source, StaticCalibration]:
        """The source with its plan and changed weights, and what that costs."""
        weights: Store = source.weights
        smoothed = 0
        if self._settings.smooth is not None:
            weights, smoothed = self._smooth(weights, plan, chosen.calibrating)
        plan = replace(
            plan,
            ranges=self.ranges(weights, plan, chosen.calibrating),
            samples=len(chosen.calibrating),
            samples_sha256=_sha256(chosen.calibrating),
        )
        biases: dict[str, dict[str, Array]] = {}
        if self._settings.bias_correction:
            biases = self._biases(weights, plan, chosen.calibrating)
        found = self._appraise(weights, biases, plan, chosen.held_out)
        corrected = sum(map(len, biases.values()))
        final = {name: _with(own, biases.get(name, {})) for name, own in weights.items()}
        source = replace(source, plan=plan, weights=final)
        return source, replace(found, smoothed=smoothed, corrected=corrected)

    def ranges(
        self, weights: Store, plan: PrecisionPlan, given: Sequence[Sample]
    ) -> dict[str, float]:
        """The range of each layer that the plan has in INT8.

        Raises CalibrationError naming a layer whose input is never reached, always zero, or no
        number.
        """
        expected = [p for p in layers_of(self._chain.model).flops if plan.at(p) == "int8"]
        histograms: dict[str, Histogram] = {}
        wanted = frozenset(expected)

        def see(path: str, x: Any) -> None:
            if path in wanted:
                histograms.setdefault(path, Histogram()).add(self._arithmetic.read(x), path)

        self._observe(weights, given, "ranges", see)
        for path in expected:
            if path not in histograms:
                raise CalibrationError(
                    f"no sample reaches {path}", hint="give samples with images and prompts"
                )
        return ranges_of({path: histograms[path] for path in expected}, self._settings.range)

    def _observe(
        self, weights: Store, given: Sequence[Sample], what: str, see: Callable[[str, Any], None]
    ) -> None:
        by = Passage(weights, self._arithmetic, lambda ops, part: Observe(ops, part.name, see))
        for number, sample in enumerate(given, 1):
            self._progress(f"{what}: sample {number} of {len(given)}")
            self._chain.run(sample, by)

    def _smooth(
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
            if any(plan.at(path) == "int8" for path in link.paths)
        }
        largest: dict[str, Array] = {}

        def see(path: str, x: Any) -> None:
            if path in wanted:
                values = np.abs(self._arithmetic.read(x))
                found = values.reshape(-1, values.shape[-1]).max(0)
                largest[path] = np.maximum(largest.get(path, found), found)

        self._observe(weights, given, "channels", see)
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

    def _errors(
        self,
        weights: Store,
        biases: Mapping[str, Mapping[str, Array]],
        plan: PrecisionPlan,
        errors: dict[str, LayerError],
    ) -> Passage:
        """The float model, each layer compared with what it is in the plan."""

        def wrap(ops: Ops[Any], part: Component) -> Appraise:
            own = {k: self._arithmetic.load(b) for k, b in biases.get(part.name, {}).items()}
            read, store = self._arithmetic.read, weights.get(part.name, {})
            return Appraise(ops, part.name, plan, store, read, errors, own)

        return Passage(weights, self._arithmetic, wrap)

    def _biases(
        self, weights: Store, plan: PrecisionPlan, given: Sequence[Sample]
    ) -> dict[str, dict[str, Array]]:
        """Biases with the mean error of their outputs added, by component and key."""
        errors: dict[str, LayerError] = {}
        by = self._errors(weights, {}, plan, errors)
        some = given[:: -(-len(given) // _CORRECTED_ON)]
        for number, sample in enumerate(some, 1):
            self._progress(f"biases: sample {number} of {len(some)}")
            self._chain.run(sample, by)
        found: dict[str, dict[str, Array]] = {}
        for path, error in errors.items():
            name, inner = path.split("/", 1)
            key = inner.replace("/", ".") + ".bias"
            if key in weights[name]:
                bias = weights[name][key].astype(np.float32) + error.shift / error.rows
                found.setdefault(name, {})[key] = bias.astype(np.float32)
        return found

    def _appraise(
        self,
        weights: Store,
        biases: Mapping[str, Mapping[str, Array]],
        plan: PrecisionPlan,
        held: Sequence[Sample],
    ) -> StaticCalibration:
        """What the plan costs on samples that it was not made from."""
        errors, whole = dict[str, LayerError](), Whole()
        plain = self._errors(weights, biases, plan, errors)
        final = {name: _with(own, biases.get(name, {})) for name, own in weights.items()}

        def wrap(ops: Ops[Any], part: Component) -> Any:
            return Quantize(ops, part.name, plan, final.get(part.name, {}).__getitem__)

        rounded = Passage(final, self._arithmetic, wrap)
        for number, sample in enumerate(held, 1):
            self._progress(f"errors: held-out sample {number} of {len(held)}")
            whole.add(self._chain.run(sample, plain), self._chain.run(sample, rounded))
        layers = layers_of(self._chain.model)
        costs = [
            LayerCost(path, plan.ranges[path], error.compared.relative_rms)
            for path, error in errors.items()
        ]
        found = tuple(
            ComponentCost(name, c.cosine, c.relative_rms, share(name, layers, plan))
            for name, c in whole.components.items()
        )
        scored = max(whole.scored, 1)
        return StaticCalibration(
            plan,
            found,
            tuple(sorted(costs, key=lambda cost: -cost.error)),
            whole.kl / scored,
            whole.same / scored,
            whole.scored,
            len(held),
        )


def _with(weights: Mapping[str, Array], biases: Mapping[str, Array]) -> Mapping[str, Array]:
    """The weights with these biases."""
    if not biases:
        return weights
    return smooth.Changed(weights, {k: lambda _, b=b: b for k, b in biases.items()})  # type: ignore[misc]


def _sha256(given: Sequence[Sample]) -> str:
    """Of all samples: the images' bytes, prompts, token ids."""
    digest = hashlib.sha256()
    for sample in given:
        if sample.ids is not None:
            digest.update(sample.ids.tobytes())
            continue
        digest.update(sample.prompt.encode())
        if sample.image is not None:
            digest.update(sample.image.read_bytes())
    return digest.hexdigest()
