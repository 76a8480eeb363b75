"""ShapeOps against the reference along every axis: the same call on shapes and on arrays."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest

from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.shape_ops import ShapeOps, Spec
from edgevlm.toolkit.ops.vocabulary import Weights

SHAPE = (2, 3, 5, 7)  # all different, and neither divides another
AXES = range(len(SHAPE))


def agree(call: Callable[[Any, Callable[..., Any]], Any]) -> None:
    """`call` gets the ops and a function that makes a tensor of the given shape."""
    shapes = call(ShapeOps(), lambda *shape: Spec(shape))
    arrays = call(NumpyOps(), lambda *shape: np.zeros(shape, np.float32))
    assert shapes.shape == arrays.shape
    assert shapes.size == arrays.size


@pytest.mark.parametrize("op", ["mean", "sum"])
@pytest.mark.parametrize("axes", [c for n in range(1, 5) for c in combinations(AXES, n)])
def test_reductions_over_every_set_of_axes(op: str, axes: tuple[int, ...]) -> None:
    agree(lambda ops, x: getattr(ops, op)(x(*SHAPE), axes))


@pytest.mark.parametrize("op", ["mean", "sum"])
@pytest.mark.parametrize("axis", AXES)
def test_reductions_over_axes_counted_from_the_end(op: str, axis: int) -> None:
    agree(lambda ops, x: getattr(ops, op)(x(*SHAPE), (axis - len(SHAPE),)))


@pytest.mark.parametrize("axis", [*AXES, -1, -3])
@pytest.mark.parametrize("lengths", [(4,), (4, 1), (1, 6, 2)])
def test_concat_along_every_axis(axis: int, lengths: tuple[int, ...]) -> None:
    def of(length: int) -> tuple[int, ...]:
        shape = list(SHAPE)
        shape[axis] = length
        return tuple(shape)

    agree(lambda ops, x: ops.concat([x(*of(n)) for n in lengths], axis))


@pytest.mark.parametrize("axis", [*AXES, -1, -2])
@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (1, 2), (1, None), (0, None), (-1, None), (0, -1), (1, 100), (2, 1)]
)
def test_slices_along_every_axis(axis: int, start: int, stop: int | None) -> None:
    agree(lambda ops, x: ops.slice(x(*SHAPE), axis, start, stop))


@pytest.mark.parametrize("axes", list(permutations(AXES)))
def test_every_transposition(axes: tuple[int, ...]) -> None:
    agree(lambda ops, x: ops.transpose(x(*SHAPE), axes))


@pytest.mark.parametrize(
    "shape",
    [
        (-1,),
        (0, -1),
        (0, 0, -1),
        (0, 0, 0, -1),
        (-1, 0, 0, 0),  # 0 keeps the axis at the same position
        (-1, 3, 0, 7),
        (0, -1, 7),
        (7, 5, 3, 2),
        (0, 15, 7),
        (1, 0, 10, 7),
        (0, 3, 5, 7, 1),
        (6, -1, 7),
    ],
)
def test_reshapes(shape: tuple[int, ...]) -> None:
    agree(lambda ops, x: ops.reshape(x(*SHAPE), shape))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("op", ["add", "mul"])
def test_either_operand_is_broadcast_along_every_axis(op: str, axis: int) -> None:
    thin = tuple(1 if i == axis else n for i, n in enumerate(SHAPE))
    agree(lambda ops, x: getattr(ops, op)(x(*SHAPE), x(*thin)))
    agree(lambda ops, x: getattr(ops, op)(x(*thin), x(*SHAPE)))
    agree(lambda ops, x: getattr(ops, op)(x(*SHAPE), x(*SHAPE[axis:])))


@pytest.mark.parametrize("size", [(9, 6), (7, 11), (3, 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
def test_convolutions_of_both_axes(
    size: tuple[int, int], kernel: tuple[int, int], stride: int, padding: int
) -> None:
    def call(ops: Any, x: Callable[..., Any]) -> Any:
        w: Weights[Any] = Weights({"weight": x(6, 2, *kernel)})
        return ops.conv(x(2, 4, *size), w, stride=stride, padding=padding, groups=2)

    agree(call)
