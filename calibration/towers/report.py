"""What is told of a tower's calibration."""

from __future__ import annotations

from edgevlm.calibration.report import Told, costliest, spared, worst
from edgevlm.calibration.towers.calibrate import TowerCalibration
from edgevlm.toolkit.strict import to_plain

_SHOWN = 8  # linears in the table; the report has all


def told(result: TowerCalibration) -> Told:
    """Of the one component that there is."""
    plan = result.plan
    embedding = {
        "cosine": result.cosine,
        "lowest_cosine": result.lowest_cosine,
        "relative_rms": result.relative_rms,
    }
    data = {
        "samples": plan.samples,
        "held_out": result.held_out,
        "embedding": embedding,
        "features": {"cosine": result.features_cosine, "relative_rms": result.features_rms},
        "share_4_bits": result.share_4_bits,
        "smoothed": result.smoothed,
        "corrected": result.corrected,
        "layers": to_plain(list(result.layers or result.rounded)),
    }
    lines = [
        f"embedding        cosine {result.cosine:.5f} (lowest {result.lowest_cosine:.5f}), "
        f"relative rms {result.relative_rms:.4f}, on {result.held_out} held-out images",
        f"features         cosine {result.features_cosine:.5f}, relative rms "
        f"{result.features_rms:.4f}, of what the last block gives",
        f"calibrated       {plan.samples} images, {plan.method}",
        *_changed(result),
        *spared(result.layers),
    ]
    if result.rounded:
        lines += worst(result.rounded, _SHOWN)
    elif result.layers:
        lines += costliest(result.layers, plan)
    name = result.component
    return Told(
        ("in codes",),
        {name: (f"{result.share:.0%}",)},
        {name: {"share": result.share}},
        data,
        lines,
    )


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
    return lines
