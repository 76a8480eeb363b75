"""Deformable attention as one function: all levels are sampled by one GridSample."""

from __future__ import annotations

import onnx

from edgevlm.export.nodes import function, ints, node, shape


def _reshaped(source: str, to: str, *dims: int | str) -> list[onnx.NodeProto]:
    """`source` in the shape `dims`, as `to`."""
    return [
        *shape(f"{to}_shape", *dims),
        node("Reshape", [source, f"{to}_shape"], [to], allowzero=0),
    ]


def _float32(source: str) -> onnx.NodeProto:
    """`source` in float32, as SOURCE_f32."""
    return node("Cast", [source], [f"{source}_f32"], to=onnx.TensorProto.FLOAT)


def _transposed(source: str, perm: list[int]) -> onnx.NodeProto:
    """`source` with its axes in another order, as SOURCE_transposed."""
    return node("Transpose", [source], [f"{source}_transposed"], perm=perm)


def _coordinates() -> list[onnx.NodeProto]:
    """step and centre: an offset in cells becomes GridSample's -1..1 by offset * step + centre.

    step [2] = 2 / (width, height); centre [Q, 1, 1, 1, 2] = 2 * reference - 1.
    """
    return [
        *shape("size", "@width", "@height"),
        _float32("size"),
        node("Constant", [], ["two"], value_float=2.0),
        node("Constant", [], ["one"], value_float=1.0),
        node("Div", ["two", "size_f32"], ["step"]),
        node("Mul", ["reference", "two"], ["doubled"]),
        node("Sub", ["doubled", "one"], ["shifted"]),
        ints("inner_axes", 1, 2, 3),
        node("Unsqueeze", ["shifted", "inner_axes"], ["centre"]),
        node("Shape", ["reference"], ["queries"], start=0, end=1),
    ]


def _sampled() -> list[onnx.NodeProto]:
    """Values at the deformed points: [B * L * M, d, Q, P].

    Levels stand before heads, so that all that is transposed is each level's matrix of cells and
    channels, which kernels do in blocks.
    """
    return [
        _float32("value"),
        _float32("offsets"),
        node("Shape", ["value"], ["channels"], start=2, end=3),
        *_reshaped("value_f32", "cells", 0, "@levels", -1, "channels"),
        _transposed("cells", [0, 1, 3, 2]),
        *_reshaped("cells_transposed", "image", -1, "@head_dim", "@height", "@width"),
        *_reshaped("offsets_f32", "shifts", 0, 0, "@num_heads", "@levels", "@num_points", 2),
        node("Mul", ["shifts", "step"], ["scaled"]),
        node("Add", ["scaled", "centre"], ["points"]),
        _transposed("points", [0, 3, 2, 1, 4, 5]),
        *_reshaped("points_transposed", "grid", -1, "queries", "@num_points", 2),
        node(
            "GridSample",
            ["image", "grid"],
            ["sampled"],
            mode="linear",
            padding_mode="zeros",
            align_corners=0,
        ),
    ]


def _weights() -> list[onnx.NodeProto]:
    """What each sample counts: [B * L * M, 1, Q, P]."""
    return [
        _float32("scores"),
        *_reshaped("scores_f32", "joint", 0, 0, "@num_heads", -1),
        node("Softmax", ["joint"], ["softmaxed"], axis=-1),
        *_reshaped("softmaxed", "apart", 0, 0, "@num_heads", "@levels", "@num_points"),
        _transposed("apart", [0, 3, 2, 1, 4]),
        *_reshaped("apart_transposed", "weights", -1, 1, "queries", "@num_points"),
    ]


def _summed() -> list[onnx.NodeProto]:
    """Over points, then over levels: [B, Q, M * d]."""
    return [
        node("Mul", ["sampled", "weights"], ["weighted"]),
        ints("point_axis", 3),
        node("ReduceSum", ["weighted", "point_axis"], ["points_sum"], keepdims=0),
        *_reshaped("points_sum", "channels_first", -1, "@levels", "channels", "queries"),
        ints("level_axis", 1),
        node("ReduceSum", ["channels_first", "level_axis"], ["levels_sum"], keepdims=0),
        _transposed("levels_sum", [0, 2, 1]),
        node("CastLike", ["levels_sum_transposed", "value"], ["y"]),
    ]


def ms_deform_attn() -> onnx.FunctionProto:
    """Deformable attention over `levels` levels of height x width cells each, in float32.

    reference [Q, 2] float32: the queries' points as (x, y) in 0..1.
    """
    return function(
        "MSDeformAttn",
        ["value", "offsets", "scores", "reference"],
        ["y"],
        ["num_heads", "num_points", "head_dim", "levels", "height", "width"],
        [*_coordinates(), *_sampled(), *_weights(), *_summed()],
    )
