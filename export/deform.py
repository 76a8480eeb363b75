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
import onnx

from edgevlm.export.nodes import function, ints, node
from edgevlm.toolkit.ops.vocabulary import Array, Grids


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
        image=[-1, d, height, width],
        shifts=[0, 0, m, levels, p, 2],
        grid=[-1, q, p, 2],
        joint=[0, 0, m, levels * p],
        weights=[0, 0, m, levels, p],
        weight=[-1, 1, q, p],
        heads=[-1, m, levels, d, q],
    )


def _many_sizes(e: Emitter, plan: Plan, value: str, offsets: str, scores: str) -> str:
    levels, m, p = len(plan.grids), plan.heads, plan.points
    joint = e.one("Reshape", [_to_float32(e, scores), e.ints(0, 0, m, levels * p)], allowzero=0)
    softmaxed = e.one("Softmax", [joint], axis=-1)
    weights = e.one("Reshape", [softmaxed, e.ints(0, 0, m, levels, p)], allowzero=0)
    shifts = e.one("Reshape", [_to_float32(e, offsets), e.ints(0, 0, m, levels, p, 2)], allowzero=0)
    found, start = [], 0
    for level, grid in enumerate(plan.grids):
        rows = _slice(e, _to_float32(e, value), 1, start, start + grid[0] * grid[1])
        moved, share = (_slice(e, x, 3, level, level + 1) for x in (shifts, weights))
        found.append(_level(e, plan, level, rows, moved, share))
        start += grid[0] * grid[1]
    total = found[0]
    for other in found[1:]:
        total = e.one("Add", [total, other])
    split = e.one("Reshape", [total, e.ints(-1, m, plan.head_width, plan.queries)], allowzero=0)
    transposed = e.one("Transpose", [split], perm=[0, 3, 1, 2])
    joined = e.one("Reshape", [transposed, e.ints(0, 0, -1)], allowzero=0)
    return e.one("CastLike", [joined, value])


def _level(e: Emitter, plan: Plan, level: int, rows: str, shifts: str, weights: str) -> str:
    """One level's samples, weighted and summed over points: [B * M, d, Q]."""
    m, p, q, d = plan.heads, plan.points, plan.queries, plan.head_width
    one = level % plan.reference.shape[1]
    grid, own = plan.grids[level], slice(one, one + 1)
    cells = e.one("Reshape", [rows, e.ints(0, grid[0], grid[1], m, d)], allowzero=0)
    transposed = e.one("Transpose", [cells], perm=[0, 3, 4, 1, 2])
    image = e.one("Reshape", [transposed, e.ints(-1, d, *grid)], allowzero=0)
    label = plan.label(grid, own)
    scaled = e.one("Mul", [shifts, e.float32(f"deform.step.{label}", plan.step(grid, own))])
    centre = e.float32(f"deform.centre.{label}", plan.centre(own))
    places = e.one("Transpose", [e.one("Add", [scaled, centre])], perm=[0, 2, 1, 3, 4, 5])
    flat = e.one("Reshape", [places, e.ints(-1, q, p, 2)], allowzero=0)
    sampled = e.one("GridSample", [image, flat], mode="linear", padding_mode="zeros",
                    align_corners=0)  # fmt: skip
    by_head = e.one("Transpose", [weights], perm=[0, 2, 1, 3, 4])
    share = e.one("Reshape", [by_head, e.ints(-1, 1, q, p)], allowzero=0)
    weighted = e.one("Mul", [sampled, share])
    return e.one("ReduceSum", [weighted, e.ints(3)], keepdims=0)


def _to_float32(e: Emitter, x: str) -> str:
    return e.one("Cast", [x], to=1)


def _slice(e: Emitter, x: str, axis: int, start: int, stop: int) -> str:
    return e.one("Slice", [x, e.ints(start), e.ints(stop), e.ints(axis), e.ints(1)])


def _reshaped(source: str, to: str) -> list[onnx.NodeProto]:
    """`source` in the shape that the attribute `to` holds, as "{to}_view"."""
    return [
        node("Constant", [], [f"{to}_shape"], value_ints=f"@{to}:INTS"),
        node("Reshape", [source, f"{to}_shape"], [f"{to}_view"], allowzero=0),
    ]


def _transposed(source: str, perm: list[int]) -> onnx.NodeProto:
    return node("Transpose", [source], [f"{source}_transposed"], perm=perm)


def _sampled() -> list[onnx.NodeProto]:
    """Values at the deformed places: [B * M * L, d, Q, P]."""
    return [
        node("Cast", ["value"], ["value_f32"], to=onnx.TensorProto.FLOAT),
        node("Cast", ["offsets"], ["offsets_f32"], to=onnx.TensorProto.FLOAT),
        *_reshaped("value_f32", "levels"),
        _transposed("levels_view", [0, 4, 1, 5, 2, 3]),
        *_reshaped("levels_view_transposed", "image"),
        *_reshaped("offsets_f32", "shifts"),
        node("Mul", ["shifts_view", "step"], ["scaled"]),
        node("Add", ["scaled", "centre"], ["places"]),
        _transposed("places", [0, 2, 3, 1, 4, 5]),
        *_reshaped("places_transposed", "grid"),
        node(
            "GridSample",
            ["image_view", "grid_view"],
            ["sampled"],
            mode="linear",
            padding_mode="zeros",
            align_corners=0,
        ),
    ]


def _weights() -> list[onnx.NodeProto]:
    """What each sample counts: [B * M * L, 1, Q, P]."""
    return [
        node("Cast", ["scores"], ["scores_f32"], to=onnx.TensorProto.FLOAT),
        *_reshaped("scores_f32", "joint"),
        node("Softmax", ["joint_view"], ["softmaxed"], axis=-1),
        *_reshaped("softmaxed", "weights"),
        _transposed("weights_view", [0, 2, 3, 1, 4]),
        *_reshaped("weights_view_transposed", "weight"),
    ]


def _summed() -> list[onnx.NodeProto]:
    """Over points, then over levels: [B, Q, M * d]."""
    return [
        node("Mul", ["sampled", "weight_view"], ["weighted"]),
        ints("point_axis", 3),
        node("ReduceSum", ["weighted", "point_axis"], ["points_sum"], keepdims=0),
        *_reshaped("points_sum", "heads"),
        ints("level_axis", 2),
        node("ReduceSum", ["heads_view", "level_axis"], ["levels_sum"], keepdims=0),
        _transposed("levels_sum", [0, 3, 1, 2]),
        ints("flat", 0, 0, -1),
        node("Reshape", ["levels_sum_transposed", "flat"], ["joined"], allowzero=0),
        node("CastLike", ["joined", "value"], ["y"]),
    ]


def ms_deform_attn() -> onnx.FunctionProto:
    """Deformable attention over levels of one size, all sampled by one GridSample.

    step and centre turn offsets into GridSample's coordinates: offset * step + centre. The
    attributes are Reshape targets: levels [0, L, h, w, M, d], image [-1, d, h, w], shifts
    [0, 0, M, L, P, 2], grid [-1, Q, P, 2], joint [0, 0, M, L * P], weights [0, 0, M, L, P], share
    [-1, 1, Q, P], heads [-1, M, L, d, Q].
    """
    return function(
        "MSDeformAttn",
        ["value", "offsets", "scores", "step", "centre"],
        ["y"],
        ["levels", "image", "shifts", "grid", "joint", "weights", "weight", "heads"],
        [*_sampled(), *_weights(), *_summed()],
    )
