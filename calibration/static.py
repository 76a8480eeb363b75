"""Static INT8 or FP8 of a bundle: its samples, its plan, and what the plan costs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.calibration import greedy, samples
from edgevlm.calibration.appraise import Whole
from edgevlm.calibration.calibrator import Calibrator, Measured
from edgevlm.calibration.chain import Arithmetic, Chain, in_numpy
from edgevlm.calibration.greedy import Agreement
from edgevlm.calibration.pictures import Chosen, Given, Progress, Sample, gather
from edgevlm.calibration.samples import Settings
from edgevlm.calibration.static_plan import layers_of, plan_of, share
from edgevlm.calibration.unfinished import Unfinished
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops.vocabulary import Array, Ops
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.vlm.config import ModelConfig

Interpreter = tuple[Ops[Any], Callable[[Array], Any], Callable[[Any], Array]]


@dataclass(frozen=True)
class ComponentCost:
    """A component on held-out samples: cosine and relative rms error of its outputs to the float
    model's, errors of earlier components included; which share of its arithmetic is rounded.
    """

    name: str
    cosine: float
    relative_rms: float
    share: float


@dataclass(frozen=True)
class LayerCost:
    """A layer on held-out samples: relative rms error of its outputs, by its own rounding alone.

    range: the largest |x| that its input keeps. in_float: whether the budget left it in float.
    """

    path: str
    range: float
    error: float
    in_float: bool = False


@dataclass(frozen=True)
class StaticCalibration:
    """What came out.

    layers: those that cost most first. kl, same_top_1: of the logits, at `scored` positions of
    held-out samples; growth: of perplexity, as far as kl says. perplexity_float, perplexity: on
    `tokens` tokens of held-out texts, None without any. answers: to held-out samples. mask_iou: of
    masks of the two models, as their decoder gives them, None without any. smoothed: how many
    inputs were; corrected: how many biases. dtype: of what the bundle has in float.
    """

    plan: PrecisionPlan
    components: tuple[ComponentCost, ...]
    layers: tuple[LayerCost, ...]
    kl: float
    same_top_1: float
    scored: int
    held_out: int
    growth: float
    within_budget: bool
    tokens: int
    perplexity_float: float | None
    perplexity: float | None
    answers: Agreement
    mask_iou: float | None = None
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
) -> tuple[Source, StaticCalibration]:
    """A float bundle's model with a plan for static INT8 or FP8, to be written to `out`.

    interpreter: ops, from an array to their tensors, and back; None for NumPy's. kept: what an
    earlier run found. Raises ToolkitError before any work where that cannot be.
    """
    samples.check(settings)
    arithmetic = Arithmetic(*interpreter) if interpreter else in_numpy()
    bundle = samples.opened(path, out, force=force)
    plan = plan_of(bundle.vlm, settings)
    chosen = gather(bundle, given, settings, progress)
    _check_reach(bundle.vlm, plan, chosen)
    source = systems.load(path, Options())
    chain = Chain(bundle.vlm, bundle.tokenizer())
    for sample in (*chosen.calibrating, *chosen.held_out):
        chain.check(sample)
    used = chosen.calibrating, chosen.held_out
    computes = type(arithmetic.ops).__name__
    kept.begin(progress, bundle.sha256, settings, *map(samples_sha256, used), computes)
    plan = replace(plan, samples=len(used[0]), samples_sha256=samples_sha256(used[0]))
    found = Calibrator(chain, arithmetic, settings, progress, kept).run(source, plan, chosen)
    return found.source, _result(found, bundle, settings, len(chosen.held_out))


def _result(
    found: Measured[Source], bundle: Bundle, settings: Settings, held_out: int
) -> StaticCalibration:
    plan, whole = found.source.plan, found.whole
    layers = layers_of(bundle.vlm)
    costs = [
        LayerCost(path, found.ranges[path], e.compared.relative_rms, plan.at(path) == "float")
        for path, e in found.first.layers.items()
    ]
    components = tuple(
        ComponentCost(name, c.cosine, c.relative_rms, share(name, layers, plan))
        for name, c in whole.components.items()
    )
    scored = max(whole.scored, 1)
    before, after = _perplexities(whole)
    return StaticCalibration(
        plan,
        components,
        tuple(sorted(costs, key=lambda cost: -cost.error)),
        whole.kl / scored,
        whole.same / scored,
        whole.scored,
        held_out,
        whole.growth,
        settings.budget is None or whole.growth <= settings.budget,
        whole.read,
        before,
        after,
        _answers(whole),
        whole.mask_iou,
        found.smoothed,
        found.corrected,
        bundle.manifest.dtype,
    )


def _answers(whole: Whole) -> Agreement:
    until = whole.same_tokens / max(whole.answers, 1)
    return Agreement(whole.answers, greedy.ANSWER, whole.same_answers, until)


def _perplexities(whole: Whole) -> tuple[float | None, float | None]:
    if not whole.read:
        return None, None
    before, after = (float(np.exp(loss / whole.read)) for loss in whole.losses)
    return before, after


def _check_reach(model: ModelConfig, plan: PrecisionPlan, chosen: Chosen) -> None:
    """Raise CalibrationError naming a component that is to be rounded and sees no sample."""
    if any(sample.image is not None for sample in chosen.calibrating):
        return
    if not chosen.calibrating:
        raise CalibrationError("there are no samples", hint="give --images, --prompts or --text")
    for path in layers_of(model).flops:
        name = path.split("/")[0]
        if name != model.lm.name and plan.at(path) != "float":
            raise CalibrationError(
                f"no sample reaches {name}: none has an image",
                hint=f"give --images FOLDER, or leave it in float: --keep-float '{name}/*'",
            )


def samples_sha256(given: Sequence[Sample]) -> str:
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
