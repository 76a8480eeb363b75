"""Recording deformable attention: one function where all levels have one size, else level by level.

Offsets become GridSample coordinates by one multiply and one add: offset * step + centre, with
step and centre known when recording.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from toolkit.ops import Array, Grids


class Emitter(Protocol):
    """What is needed of a recorder."""

    def one(self, kind: str, inputs: Sequence[str], name: str = "", **attrs: Any) -> str: ...

    def ints(self, *values: int) -> str: ...

    def float32(self, name: str, value: Array) -> str: ...


@dataclass(frozen=True)
class Plan:
    """One call's fixed sizes; reference as in Ops.ms_deform_attn."""

    grids: Grids
    heads: int
    points: int
    reference: Array
    head_width: int

    @property
    def queries(self) -> int:
        """Number of query tokens."""
        return int(self.reference.shape[0])

    def step(self, grid: tuple[int, int], levels: slice) -> Array:
        """What an offset is multiplied by: [2] or [Q, 1, levels, 1, 2] float32."""
        if self.reference.shape[2] == 2:
            return np.asarray([2 / grid[1], 2 / grid[0]], np.float32)
        boxes = self.reference[:, None, levels, None, 2:] / self.points
        return boxes.astype(np.float32)

    def centre(self, levels: slice) -> Array:
        """Where offset zero lies in GridSample's -1..1: [Q, 1, levels, 1, 2] float32."""
        return (2 * self.reference[:, None, levels, None, :2] - 1).astype(np.float32)

    def label(self, grid: tuple[int, int], levels: slice) -> str:
        """A name that tables of equal content share."""
        content = self.step(grid, levels).tobytes() + self.centre(levels).tobytes()
        return f"{grid[0]}x{grid[1]}.{hashlib.sha256(content).hexdigest()[:8]}"


def record(e: Emitter, plan: Plan, value: str, offsets: str, scores: str) -> str:
    """The nodes of one call; the name of its output."""
    if len(set(plan.grids)) == 1:
        return _one_size(e, plan, value, offsets, scores)
    return _many_sizes(e, plan, value, offsets, scores)


def _one_size(e: Emitter, plan: Plan, value: str, offsets: str, scores: str) -> str:
    (height, width), levels = plan.grids[0], len(plan.grids)
    m, p, q, d = plan.heads, plan.points, plan.queries, plan.head_width
    every = slice(None)
    label = plan.label((height, width), every)
    inputs = [
        value,
        offsets,
        scores,
        e.float32(f"deform.step.{label}", plan.step(plan.grids[0], every)),
        e.float32(f"deform.centre.{label}", plan.centre(every)),
    ]
    return e.one(
        "edgevlm.MSDeformAttn",
        inputs,
        levels=[0, levels, height, width, m, d],
        picture=[-1, d, height, width],
        shifts=[0, 0, m, levels, p, 2],
        grid=[-1, q, p, 2],
        joint=[0, 0, m, levels * p],
        shares=[0, 0, m, levels, p],
        share=[-1, 1, q, p],
        heads=[-1, m, levels, d, q],
    )


def _many_sizes(e: Emitter, plan: Plan, value: str, offsets: str, scores: str) -> str:
    levels, m, p = len(plan.grids), plan.heads, plan.points
    joint = e.one("Reshape", [_wide(e, scores), e.ints(0, 0, m, levels * p)], allowzero=0)
    softmaxed = e.one("Softmax", [joint], axis=-1)
    shares = e.one("Reshape", [softmaxed, e.ints(0, 0, m, levels, p)], allowzero=0)
    shifts = e.one("Reshape", [_wide(e, offsets), e.ints(0, 0, m, levels, p, 2)], allowzero=0)
    found, start = [], 0
    for level, grid in enumerate(plan.grids):
        rows = _slice(e, _wide(e, value), 1, start, start + grid[0] * grid[1])
        moved, share = (_slice(e, x, 3, level, level + 1) for x in (shifts, shares))
        found.append(_level(e, plan, level, rows, moved, share))
        start += grid[0] * grid[1]
    total = found[0]
    for other in found[1:]:
        total = e.one("Add", [total, other])
    split = e.one("Reshape", [total, e.ints(-1, m, plan.head_width, plan.queries)], allowzero=0)
    turned = e.one("Transpose", [split], perm=[0, 3, 1, 2])
    joined = e.one("Reshape", [turned, e.ints(0, 0, -1)], allowzero=0)
    return e.one("CastLike", [joined, value])


def _level(e: Emitter, plan: Plan, level: int, rows: str, shifts: str, shares: str) -> str:
    """One level's samples, weighted and summed over points: [B * M, d, Q]."""
    m, p, q, d = plan.heads, plan.points, plan.queries, plan.head_width
    grid, own = plan.grids[level], slice(level, level + 1)
    cells = e.one("Reshape", [rows, e.ints(0, grid[0], grid[1], m, d)], allowzero=0)
    turned = e.one("Transpose", [cells], perm=[0, 3, 4, 1, 2])
    picture = e.one("Reshape", [turned, e.ints(-1, d, *grid)], allowzero=0)
    label = plan.label(grid, own)
    scaled = e.one("Mul", [shifts, e.float32(f"deform.step.{label}", plan.step(grid, own))])
    centre = e.float32(f"deform.centre.{label}", plan.centre(own))
    places = e.one("Transpose", [e.one("Add", [scaled, centre])], perm=[0, 2, 1, 3, 4, 5])
    flat = e.one("Reshape", [places, e.ints(-1, q, p, 2)], allowzero=0)
    sampled = e.one("GridSample", [picture, flat], mode="linear", padding_mode="zeros",
                    align_corners=0)  # fmt: skip
    by_head = e.one("Transpose", [shares], perm=[0, 2, 1, 3, 4])
    share = e.one("Reshape", [by_head, e.ints(-1, 1, q, p)], allowzero=0)
    weighted = e.one("Mul", [sampled, share])
    return e.one("ReduceSum", [weighted, e.ints(3)], keepdims=0)


def _wide(e: Emitter, x: str) -> str:
    return e.one("Cast", [x], to=1)


def _slice(e: Emitter, x: str, axis: int, start: int, stop: int) -> str:
    return e.one("Slice", [x, e.ints(start), e.ints(stop), e.ints(axis), e.ints(1)])
