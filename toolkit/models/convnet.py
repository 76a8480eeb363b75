"""Pieces of convolutional towers: images of any size, stages of blocks, tokens row by row."""

from __future__ import annotations

from edgevlm.toolkit.ops.vocabulary import Ops, T, Weights

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


def tokens(op: Ops[T], x: T, channels: int) -> T:
    """[B, width, H, W] -> [B, H * W, width], row by row."""
    return op.transpose(op.reshape(x, (0, channels, -1)), (0, 2, 1))


def conv_shapes(name: str, inputs: int, outputs: int, size: int, groups: int = 1) -> Shapes:
    """Weight and bias of a convolution."""
    return {f"{name}.weight": (outputs, inputs // groups, size, size), f"{name}.bias": (outputs,)}


def norm_shapes(name: str, channels: int) -> Shapes:
    """Weight and bias of a layer norm."""
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
