"""Pieces of convolutional towers: images of any size, stages of blocks, tokens row by row."""

from __future__ import annotations

import numpy as np

from edgevlm.toolkit.models.recipes import Recipe
from edgevlm.toolkit.ops.vocabulary import Array, Ops, T, Weights

Shapes = dict[str, tuple[int, ...]]


def channels_last(op: Ops[T], x: T) -> T:
    """[B, C, H, W] -> [B, H, W, C]."""
    return op.transpose(x, (0, 2, 3, 1))


def channels_first(op: Ops[T], x: T) -> T:
    """[B, H, W, C] -> [B, C, H, W]."""
    return op.transpose(x, (0, 3, 1, 2))


def channel_norm(op: Ops[T], x: T, w: Weights[T], eps: float) -> T:
    """Layer norm over the channels of [B, C, H, W]."""
    return channels_first(op, op.layer_norm(channels_last(op, x), w, eps))


def squares(op: Ops[T], x: T) -> T:
    """[B, H, W, C] -> [B, H // 2, W // 2, 4C]: the cells of every 2 x 2 square, row by row.

    A linear behind it is a convolution of size and stride 2, whose products can be of integers.
    """
    halves = [op.slice(x, 1, i, i - 1 or None, 2) for i in (0, 1)]
    return op.concat([op.slice(half, 2, i, i - 1 or None, 2) for half in halves for i in (0, 1)], 3)


def tokens(op: Ops[T], x: T, channels: int) -> T:
    """[B, width, H, W] -> [B, H * W, width], row by row."""
    return op.transpose(op.reshape(x, (0, channels, -1)), (0, 2, 1))


def conv_shapes(name: str, inputs: int, outputs: int, size: int, groups: int = 1) -> Shapes:
    """Weight and bias of a convolution."""
    return {f"{name}.weight": (outputs, inputs // groups, size, size), f"{name}.bias": (outputs,)}


def norm_shapes(name: str, channels: int) -> Shapes:
    """Weight and bias of a layer norm."""
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def of_squares(source: str) -> Recipe:
    """The weight of a convolution of size and stride 2, stored [out, in, 2, 2], for `squares`."""

    def make(kernel: Array) -> Array:
        return np.asarray(kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0]))

    def undo(ours: Array, *_: Array) -> tuple[Array, ...]:
        return (ours.reshape(2, 2, -1, ours.shape[1]).transpose(3, 2, 0, 1),)

    return Recipe((source,), make, undo)
