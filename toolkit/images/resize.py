"""Resizing as torch computes it: bicubic of position embeddings, bilinear of masks."""

from __future__ import annotations

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array


def bicubic(table: Array, size: tuple[int, int], *, antialias: bool) -> Array:
    """table [H, W, D] resized to [size[0], size[1], D], align_corners off, in float32.

    Without antialias: cubic convolution (Keys, 1981) with a = -0.75, edges repeated. With it:
    a = -0.5, the kernel stretched when shrinking and renormalised at the edges.
    """
    for axis, after in enumerate(size):
        before = table.shape[axis]
        if antialias or before != after:
            weights = (_smooth if antialias else _plain)(before, after)
            table = np.moveaxis(np.tensordot(weights, table, ([1], [axis])), 0, axis)
    return table.astype(np.float32)


def _plain(before: int, after: int) -> Array:
    points = (np.arange(after) + 0.5) * (before / after) - 0.5
    low = np.floor(points).astype(int)
    matrix = np.zeros((after, before))
    for tap in range(-1, 3):
        columns = np.clip(low + tap, 0, before - 1)
        np.add.at(matrix, (np.arange(after), columns), _cubic(points - low - tap, -0.75))
    return matrix


def _smooth(before: int, after: int) -> Array:
    scale = before / after
    stretch = max(scale, 1.0)
    centres = (np.arange(after) + 0.5) * scale
    matrix = np.zeros((after, before))
    for row, centre in enumerate(centres):
        first = max(int(centre - 2 * stretch + 0.5), 0)
        last = min(int(centre + 2 * stretch + 0.5), before)
        columns = np.arange(first, last)
        weights = _cubic((columns - centre + 0.5) / stretch, -0.5)
        matrix[row, first:last] = weights / weights.sum()
    return matrix


def _cubic(x: Array, a: float) -> Array:
    """Keys' kernel: 1 at 0, 0 at 1 and from 2 on."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bilinear(image: Array, size: tuple[int, int], *, cut: tuple[int, int] | None = None) -> Array:
    """image [H, W] resized to `size`, as torch does with align_corners off and without antialias.

    cut: compute the upper left corner of this size alone. In float32.
    """
    rows, columns = cut or size
    top, below, y = _between(image.shape[0], size[0], rows)
    left, right, x = _between(image.shape[1], size[1], columns)
    mixed = image[:, left] * (1 - x) + image[:, right] * x
    return np.asarray(mixed[top] * (1 - y)[:, None] + mixed[below] * y[:, None], np.float32)


def _between(before: int, after: int, count: int) -> tuple[Array, Array, Array]:
    """For each of the first `count` places: the two indices around it, and how near the second."""
    step = np.float32(before) / np.float32(after)
    points = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5)
    points = np.maximum(points, np.float32(0))
    low = points.astype(np.int64)
    return low, np.minimum(low + 1, before - 1), points - low.astype(np.float32)
