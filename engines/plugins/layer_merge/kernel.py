"""Levels normed, scaled and multiplied in one kernel: the normed levels are never written.

One program makes ROWS x COLUMNS of the output. For each level it reads its rows twice, once for
their mean and deviation and once, out of the cache by then, for the product.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from edgevlm.engines.plugins.compile import launched
from edgevlm.engines.plugins.layer_merge.spec import Attributes


@triton.jit
def _statistics(x, rows, there, start, HIDDEN: tl.constexpr, DEPTH: tl.constexpr,
                epsilon: tl.constexpr):  # fmt: skip
    """Mean and 1 / deviation of a level's rows; sums are of differences to the first channel,
    so that a large mean costs no digits."""
    first = tl.load(x + rows + start, mask=there, other=0.0).to(tl.float32)
    total, squares = tl.zeros_like(first), tl.zeros_like(first)
    for k in range(0, HIDDEN, DEPTH):
        c = k + tl.arange(0, DEPTH)
        mask = there[:, None] & (c < HIDDEN)[None, :]
        read = tl.load(x + rows[:, None] + (start + c)[None, :], mask=mask, other=0.0)
        apart = tl.where(mask, read.to(tl.float32) - first[:, None], 0.0)
        total += tl.sum(apart, 1)
        squares += tl.sum(apart * apart, 1)
    mean = total / HIDDEN
    variance = tl.maximum(squares / HIDDEN - mean * mean, 0.0)
    return first + mean, 1.0 / tl.sqrt(variance + epsilon)


@triton.jit
def layer_merge(x, norm_weight, norm_bias, scale, weight, bias, tokens, y, LEVELS: tl.constexpr,
                HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr, EPSILON: tl.constexpr,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDEN: tl.constexpr,
                DEPTH: tl.constexpr):  # fmt: skip
    """x [tokens, LEVELS * HIDDEN], norm_weight and norm_bias [LEVELS, HIDDEN], scale [LEVELS],
    weight [LEVELS * HIDDEN, OUTPUTS], bias [LEVELS, OUTPUTS] -> y [tokens, OUTPUTS].
    The grid is ceil(tokens / ROWS) * ceil(OUTPUTS / COLUMNS) programs.
    """
    WIDTH: tl.constexpr = LEVELS * HIDDEN
    across = tl.cdiv(OUTPUTS, COLUMNS)
    program = tl.program_id(0)
    row = (program // across) * ROWS + tl.arange(0, ROWS)
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    there, wanted = row < tokens, column < OUTPUTS
    rows = row.to(tl.int64) * WIDTH
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    offset = tl.zeros((COLUMNS,), tl.float32)
    for level in range(LEVELS):
        start = level * HIDDEN
        share = tl.load(scale + level).to(tl.float32)
        mean, scaling = _statistics(x, rows, there, start, HIDDEN, DEPTH, EPSILON)
        read = tl.load(bias + level * OUTPUTS + column, mask=wanted, other=0.0)
        offset += share * read.to(tl.float32)
        for k in range(0, HIDDEN, DEPTH):
            c = k + tl.arange(0, DEPTH)
            inside = c < HIDDEN
            gain = tl.load(norm_weight + start + c, mask=inside, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias + start + c, mask=inside, other=0.0).to(tl.float32)
            mask = there[:, None] & inside[None, :]
            part = tl.load(x + rows[:, None] + (start + c)[None, :], mask=mask, other=0.0)
            normed = (part.to(tl.float32) - mean[:, None]) * scaling[:, None]
            ready = (normed * gain[None, :] + shift[None, :]) * share
            table = weight + (start + c).to(tl.int64)[:, None] * OUTPUTS + column[None, :]
            kernel = tl.load(table, mask=inside[:, None] & wanted[None, :], other=0.0)
            ready = ready.to(weight.dtype.element_ty)
            if WIDEN:
                ready, kernel = ready.to(tl.float32), kernel.to(tl.float32)
            result = tl.dot(ready, kernel, result, input_precision="ieee")
    place = y + row.to(tl.int64)[:, None] * OUTPUTS + column[None, :]
    done = (result + offset[None, :]).to(y.dtype.element_ty)
    tl.store(place, done, mask=there[:, None] & wanted[None, :])


def run(x: Any, norm_weight: Any, norm_bias: Any, scale: Any, weight: Any, bias: Any,
        at: Attributes) -> Any:  # fmt: skip
    """y [B, tokens, OUTPUTS] of torch tensors on one card; x [B, tokens, LEVELS * HIDDEN]."""
    y = x.new_empty((*x.shape[:2], at.outputs))
    tokens = x.shape[0] * x.shape[1]
    # The interpreter would multiply the bits of bf16 as integers.
    interpreted = not isinstance(layer_merge, triton.JITFunction)
    return launched(
        layer_merge,
        lambda dtype: at.launch(dtype, widen=interpreted),
        lambda dtype: at.programs(tokens, dtype),
        (x, norm_weight, norm_bias, scale, weight, bias, tokens, y),
    )
