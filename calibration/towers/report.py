"""What is printed of a tower's calibration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.calibration.towers.calibrate import TowerCalibration
from edgevlm.toolkit.strict import to_plain
from edgevlm.toolkit.terminal.console import human_bytes, table

_SHOWN = 8  # layers in the table; the report has all


def summary(
    result: TowerCalibration, out: Path, sizes: Mapping[str, tuple[int, int]], following: str
) -> tuple[dict[str, Any], list[str]]:
    """Data and lines; sizes: bytes of the tower's weights before and after."""
    before, after = sizes[result.component]
    plan = result.plan
    embedding = {
        "cosine": result.cosine,
        "lowest_cosine": result.lowest_cosine,
        "relative_rms": result.relative_rms,
    }
    features = {"cosine": result.features_cosine, "relative_rms": result.features_rms}
    data = {
        "kind": "calibration",
        "bundle": str(out),
        "method": plan.method,
        "samples": plan.samples,
        "held_out": result.held_out,
        "components": [
            {
                "name": result.component,
                "bytes_before": before,
                "bytes_after": after,
                "share": result.share,
            }
        ],
        "embedding": embedding,
        "features": features,
        "within_budget": result.within_budget,
        "share_4_bits": result.share_4_bits,
        "smoothed": result.smoothed,
        "corrected": result.corrected,
        "layers": to_plain(list(result.layers or result.rounded)),
        "next": following,
    }
    columns = ("component", "weights before", "after", "in codes")
    row = (result.component, human_bytes(before), human_bytes(after), f"{result.share:.0%}")
    lines = [
        *table(columns, [row]),
        f"embedding        cosine {result.cosine:.5f} (lowest {result.lowest_cosine:.5f}), "
        f"relative rms {result.relative_rms:.4f}, on {result.held_out} held-out images",
        f"features         cosine {result.features_cosine:.5f}, relative rms "
        f"{result.features_rms:.4f}, of what the last block gives",
        f"calibrated       {plan.samples} images, {plan.method}",
        *_changed(result),
        *_worst(result),
    ]
    if not result.within_budget:
        lines.append("the budget does not hold: this is the best that was found")
    return data, lines


def _changed(result: TowerCalibration) -> list[str]:
    lines = []
    if result.smoothed or result.corrected:
        lines.append(
            f"changed          {result.smoothed} inputs smoothed, {result.corrected} biases "
            "corrected"
        )
    if result.rounded:
        lines.append(
            f"in 4 bits        {result.share_4_bits:.0%} of the weights of the blocks' linears"
        )
    spared = sum(layer.in_float for layer in result.layers)
    if spared:
        lines.append(f"left in float    {spared} of {len(result.layers)} layers, for the budget")
    return lines


def _worst(result: TowerCalibration) -> list[str]:
    """A table of the layers that cost most."""
    if result.rounded:
        worst = sorted(result.rounded, key=lambda one: -one.error_4_bits)[:_SHOWN]
        shown = [(one.path, f"{one.error_4_bits:.2%}", f"{one.bits}") for one in worst]
        return table(("largest errors", "in 4 bits", "has bits"), shown)
    if not result.layers:
        return []
    rows = [
        (one.path, one.range, one.error, result.plan.at(one.path)) for one in result.layers[:_SHOWN]
    ]
    return table(("layers that cost most", "range", "relative rms", "in"), rows)
