"""Deformable attention in one pass: softmax, sampling and both sums, nothing written between.

One program makes QUERIES queries of one head. A sampled cell is one read of a head's channels,
which lie together; a head's values are read many times and stay in the second-level cache.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from edgevlm.engines.plugins.compile import launched
from edgevlm.engines.plugins.ms_deform_attn.spec import Attributes


@triton.jit
def _corner(value, x, y, weight, base, d, HEAD_DIM: tl.constexpr, STRIDE: tl.constexpr,
            HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """weight times the channels of cells (x, y), zero outside the grid: [QUERIES, CHANNELS]."""
    inside = (x >= 0) & (x < WIDTH) & (y >= 0) & (y < HEIGHT)
    cell = base + (y * WIDTH + x) * STRIDE
    mask = inside[:, None] & (d < HEAD_DIM)[None, :]
    read = tl.load(value + cell[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    return weight[:, None] * read


@triton.jit
def ms_deform_attn(value, offsets, scores, reference, queries, y, HEADS: tl.constexpr,
                   POINTS: tl.constexpr, HEAD_DIM: tl.constexpr, LEVELS: tl.constexpr,
                   HEIGHT: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
                   CHANNELS: tl.constexpr, SAMPLES: tl.constexpr):  # fmt: skip
    """value [B, LEVELS * HEIGHT * WIDTH, HEADS * HEAD_DIM], offsets [B, Q, HEADS * LEVELS * POINTS
    * 2] in cells, scores [B, Q, HEADS * LEVELS * POINTS], reference [Q, 2] float32 in 0..1
    -> y [B, Q, HEADS * HEAD_DIM]. The grid is B * ceil(Q / QUERIES) * HEADS programs.
    """
    COUNT: tl.constexpr = LEVELS * POINTS
    STRIDE: tl.constexpr = HEADS * HEAD_DIM
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, QUERIES)
    head = program % HEADS
    q = (program // HEADS % blocks) * QUERIES + tl.arange(0, QUERIES)
    batch = (program // HEADS // blocks).to(tl.int64)
    there = q < queries
    row = ((batch * queries + q) * HEADS + head) * COUNT
    d = tl.arange(0, CHANNELS)

    j = tl.arange(0, SAMPLES)
    asked = there[:, None] & (j < COUNT)[None, :]
    score = tl.load(scores + row[:, None] + j[None, :], mask=asked, other=float("-inf"))
    score = tl.where((j < COUNT)[None, :], score.to(tl.float32), float("-inf"))
    score = tl.where(there[:, None], score, 0.0)
    most = tl.max(score, 1)
    total = tl.sum(tl.exp(score - most[:, None]), 1)

    x0 = tl.load(reference + 2 * q, mask=there, other=0.0) * WIDTH - 0.5
    y0 = tl.load(reference + 2 * q + 1, mask=there, other=0.0) * HEIGHT - 0.5
    result = tl.zeros((QUERIES, CHANNELS), tl.float32)
    for sample in range(COUNT):
        at = row + sample
        weight = tl.load(scores + at, mask=there, other=0.0).to(tl.float32)
        weight = tl.exp(weight - most) / total
        fx = x0 + tl.load(offsets + 2 * at, mask=there, other=0.0).to(tl.float32)
        fy = y0 + tl.load(offsets + 2 * at + 1, mask=there, other=0.0).to(tl.float32)
        # Far outside nothing is read; kept near, so that cells' numbers fit 32 bits.
        fx = tl.minimum(tl.maximum(fx, -2.0), WIDTH + 1.0)
        fy = tl.minimum(tl.maximum(fy, -2.0), HEIGHT + 1.0)
        left, top = tl.floor(fx), tl.floor(fy)
        right, down = fx - left, fy - top
        cx, cy = left.to(tl.int32), top.to(tl.int32)
        level = batch * LEVELS + sample // POINTS
        base = level * (HEIGHT * WIDTH * STRIDE) + head * HEAD_DIM
        for corner in tl.static_range(4):
            wx = right if corner % 2 else 1.0 - right
            wy = down if corner // 2 else 1.0 - down
            result += _corner(value, cx + corner % 2, cy + corner // 2, weight * wx * wy, base,
                              d, HEAD_DIM, STRIDE, HEIGHT, WIDTH)  # fmt: skip
    out = (batch * queries + q) * STRIDE + head * HEAD_DIM
    mask = there[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(y + out[:, None] + d[None, :], result.to(y.dtype.element_ty), mask=mask)


def run(value: Any, offsets: Any, scores: Any, reference: Any, at: Attributes) -> Any:
    """y of torch tensors on one card, in the shapes of the kernel."""
    batch, queries = offsets.shape[:2]
    y = value.new_empty((batch, queries, value.shape[2]))
    return launched(
        ms_deform_attn,
        at.launch,
        lambda dtype: at.programs(batch, queries, dtype),
        (value, offsets, scores, reference, queries, y),
    )
