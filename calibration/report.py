"""What is printed of a calibration: what all kinds have in common, around what one tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.calibration.static import LayerCost
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.terminal.console import human_bytes, table

_SHOWN = 8  # layers in the table; the report has all


@dataclass(frozen=True)
class Told:
    """What one kind of calibration tells.

    columns, cells: of the table of components beside their sizes, cells by component; figures: the
    same as data. data, lines: of the whole.
    """

    columns: tuple[str, ...]
    cells: Mapping[str, tuple[str, ...]]
    figures: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]
    lines: Sequence[str]


def whole(
    told: Told,
    plan: PrecisionPlan,
    within_budget: bool,
    out: Path,
    sizes: Mapping[str, tuple[int, int]],
    following: str,
) -> tuple[dict[str, Any], list[str]]:
    """Data and lines. sizes: bytes of each component's weights before and after; following: the
    next command.
    """
    parts = [
        {"name": name, "bytes_before": before, "bytes_after": after, **told.figures[name]}
        for name, (before, after) in sizes.items()
    ]
    begin = {"kind": "calibration", "bundle": str(out), "method": plan.method, "components": parts}
    data = {**begin, **told.data, "within_budget": within_budget, "next": following}
    rows = [(name, *map(human_bytes, size), *told.cells[name]) for name, size in sizes.items()]
    lines = [*table(("component", "weights before", "after", *told.columns), rows), *told.lines]
    if not within_budget:
        lines.append("the budget does not hold: this is the best that was found")
    return data, lines


def spared(layers: Sequence[LayerCost]) -> list[str]:
    """How many of the layers were left in float."""
    count = sum(layer.in_float for layer in layers)
    line = f"left in float    {count} of {len(layers)} layers, for the budget"
    return [line] if count else []


def costliest(layers: Sequence[LayerCost], plan: PrecisionPlan) -> list[str]:
    """A table of the layers that cost most, which come first."""
    rows = [(one.path, one.range, one.error, plan.at(one.path)) for one in layers[:_SHOWN]]
    return table(("layers that cost most", "range", "relative rms", "in"), rows)


def worst(layers: Sequence[Any], most: int) -> list[str]:
    """A table of the linears, of those with fields path, error_4_bits and bits, with the largest
    errors in 4 bits: where 8 would be chosen first.
    """
    found = sorted(layers, key=lambda layer: -layer.error_4_bits)[:most]
    rows = [(x.path, f"{x.error_4_bits:.2%}", f"{x.bits}") for x in found if x.error_4_bits]
    return table(("largest errors", "in 4 bits", "has bits"), rows) if rows else []
