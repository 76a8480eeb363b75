"""What is printed of a calibration for static INT8 or FP8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.calibration.static import ComponentCost, StaticCalibration
from edgevlm.toolkit.strict import to_plain
from edgevlm.toolkit.terminal.console import human_bytes, table

_SHOWN = 8  # layers in the table; the report has all


def summary(
    result: StaticCalibration, out: Path, sizes: Mapping[str, tuple[int, int]], following: str
) -> tuple[dict[str, Any], list[str]]:
    """Data and lines; sizes: bytes of each component's weights before and after."""
    costs = {cost.name: cost for cost in result.components}
    plan = result.plan
    to = plan.default
    data = {
        "kind": "calibration",
        "bundle": str(out),
        "method": plan.method,
        "samples": plan.samples,
        "held_out": result.held_out,
        "components": [
            {
                "name": name,
                "bytes_before": before,
                "bytes_after": after,
                f"share_{to}": costs[name].share if name in costs else 0.0,
                "cosine": costs[name].cosine if name in costs else None,
                "relative_rms": costs[name].relative_rms if name in costs else None,
            }
            for name, (before, after) in sizes.items()
        ],
        "kl": result.kl,
        "same_top_1": result.same_top_1,
        "scored": result.scored,
        "answers": to_plain(result.answers),
        "mask_iou": result.mask_iou,
        "growth": result.growth,
        "within_budget": result.within_budget,
        "tokens": result.tokens,
        "perplexity_float": result.perplexity_float,
        "perplexity": result.perplexity,
        "smoothed": result.smoothed,
        "corrected": result.corrected,
        "layers": to_plain(result.layers),
        "next": following,
    }
    return data, _lines(result, sizes, costs, to)


def _lines(
    result: StaticCalibration,
    sizes: Mapping[str, tuple[int, int]],
    costs: Mapping[str, ComponentCost],
    to: str,
) -> list[str]:
    plan = result.plan
    columns = ("component", "weights before", "after", f"in {to}", "cosine", "relative rms")
    rows = [
        (name, human_bytes(before), human_bytes(after), *_figures(costs.get(name)))
        for name, (before, after) in sizes.items()
    ]
    worst = [
        (cost.path, cost.range, cost.error, "float" if cost.in_float else to)
        for cost in result.layers[:_SHOWN]
    ]
    lines = [
        *table(columns, rows),
        f"logits           KL {result.kl:.4f}, same likeliest token {result.same_top_1:.1%}, at "
        f"{result.scored} positions of {result.held_out} held-out samples",
        f"greedy           {result.answers.text}",
        f"calibrated       {plan.samples} samples, {plan.method}",
        f"changed          {result.smoothed} inputs smoothed, {result.corrected} biases corrected",
        *_masks(result),
        *_text(result),
        *table(("layers that cost most", "range", "relative rms", "in"), worst),
    ]
    if not result.within_budget:
        lines.append("the budget does not hold: this is the best that was found")
    return lines


def _masks(result: StaticCalibration) -> list[str]:
    """How far masks are those of the float model."""
    if result.mask_iou is None:
        return []
    return [f"masks            IoU with those of the float model {result.mask_iou:.4f}"]


def _text(result: StaticCalibration) -> list[str]:
    """What it costs on text, and which layers were left in float for that."""
    lines = []
    if result.perplexity_float is not None and result.perplexity is not None:
        lines.append(
            f"perplexity       {result.perplexity_float:.2f} -> {result.perplexity:.2f}, on "
            f"{result.tokens:,} tokens of held-out text"
        )
    spared = sum(cost.in_float for cost in result.layers)
    if spared:
        lines.append(f"left in float    {spared} of {len(result.layers)} layers, for the budget")
    return lines


def _figures(cost: Any) -> tuple[str, str, str]:
    if cost is None:
        return "-", "-", "-"
    return f"{cost.share:.0%}", f"{cost.cosine:.5f}", f"{cost.relative_rms:.3f}"
