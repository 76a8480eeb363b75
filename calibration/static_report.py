"""What is told of a calibration for static INT8 or FP8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgevlm.calibration.report import Told, costliest, spared
from edgevlm.calibration.static import ComponentCost, StaticCalibration
from edgevlm.toolkit.strict import to_plain


def told(result: StaticCalibration, names: Sequence[str]) -> Told:
    """names: of all components, those that stay in float too."""
    costs = {cost.name: cost for cost in result.components}
    plan, to = result.plan, result.plan.default
    data = {
        "samples": plan.samples,
        "held_out": result.held_out,
        "kl": result.kl,
        "same_top_1": result.same_top_1,
        "scored": result.scored,
        "answers": to_plain(result.answers),
        "mask_iou": result.mask_iou,
        "growth": result.growth,
        "tokens": result.tokens,
        "perplexity_float": result.perplexity_float,
        "perplexity": result.perplexity,
        "smoothed": result.smoothed,
        "corrected": result.corrected,
        "layers": to_plain(result.layers),
    }
    lines = [
        f"logits           KL {result.kl:.4f}, same likeliest token {result.same_top_1:.1%}, at "
        f"{result.scored} positions of {result.held_out} held-out samples",
        f"greedy           {result.answers.text}",
        f"calibrated       {plan.samples} samples, {plan.method}",
        f"changed          {result.smoothed} inputs smoothed, {result.corrected} biases corrected",
        *_masks(result),
        *_text(result),
        *spared(result.layers),
        *costliest(result.layers, plan),
    ]
    return Told(
        (f"in {to}", "cosine", "relative rms"),
        {name: _cells(costs.get(name)) for name in names},
        {name: _figures(costs.get(name), to) for name in names},
        data,
        lines,
    )


def _masks(result: StaticCalibration) -> list[str]:
    """How far masks are those of the float model."""
    if result.mask_iou is None:
        return []
    return [f"masks            IoU with those of the float model {result.mask_iou:.4f}"]


def _text(result: StaticCalibration) -> list[str]:
    """What it costs on text."""
    if result.perplexity_float is None or result.perplexity is None:
        return []
    return [
        f"perplexity       {result.perplexity_float:.2f} -> {result.perplexity:.2f}, on "
        f"{result.tokens:,} tokens of held-out text"
    ]


def _cells(cost: ComponentCost | None) -> tuple[str, str, str]:
    if cost is None:
        return "-", "-", "-"
    return f"{cost.share:.0%}", f"{cost.cosine:.5f}", f"{cost.relative_rms:.3f}"


def _figures(cost: ComponentCost | None, to: str) -> dict[str, Any]:
    return {
        f"share_{to}": cost.share if cost else 0.0,
        "cosine": cost.cosine if cost else None,
        "relative_rms": cost.relative_rms if cost else None,
    }
