"""Bicubic resizing of tables, as torch computes it: position embeddings for another grid."""

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
