"""Queries and keys turned by their angles in one pass, and laid out by heads as attention reads
them. One program turns TOKENS tokens of HEADS_EACH heads: angles' cosines serve both and all.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from edgevlm.engines.plugins.compile import launched
from edgevlm.engines.plugins.rotary.spec import Attributes


@triton.jit
def _turn(source, target, left, out, cos, sin, mask, HALF: tl.constexpr):
    """The two halves of one head's channels turned by their angles."""
    a = tl.load(source + left, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + left + HALF, mask=mask, other=0.0).to(tl.float32)
    kind = target.dtype.element_ty
    tl.store(target + out, (a * cos - b * sin).to(kind), mask=mask)
    tl.store(target + out + HALF, (b * cos + a * sin).to(kind), mask=mask)


@triton.jit
def rotary(q, k, angles, tokens, q_rotated, k_rotated, HEADS: tl.constexpr,
           HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, HEADS_EACH: tl.constexpr,
           CHANNELS: tl.constexpr):  # fmt: skip
    """q, k [B, tokens, HEADS * HEAD_DIM], angles [tokens, HEAD_DIM / 2] float32
    -> q_rotated, k_rotated [B, HEADS, tokens, HEAD_DIM].
    The grid is B * ceil(tokens / TOKENS) * (HEADS / HEADS_EACH) programs.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    groups = HEADS // HEADS_EACH
    blocks = tl.cdiv(tokens, TOKENS)
    program = tl.program_id(0)
    group = program % groups
    s = (program // groups % blocks) * TOKENS + tl.arange(0, TOKENS)
    batch = (program // groups // blocks).to(tl.int64)
    d = tl.arange(0, CHANNELS)
    there = (s < tokens)[:, None] & (d < HALF)[None, :]
    angle = tl.load(angles + s[:, None] * HALF + d[None, :], mask=there, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    for i in range(HEADS_EACH):
        head = group * HEADS_EACH + i
        left = ((batch * tokens + s) * HEADS + head)[:, None] * HEAD_DIM + d[None, :]
        out = ((batch * HEADS + head) * tokens + s)[:, None] * HEAD_DIM + d[None, :]
        _turn(q, q_rotated, left, out, cos, sin, there, HALF)
        _turn(k, k_rotated, left, out, cos, sin, there, HALF)


def run(q: Any, k: Any, angles: Any, at: Attributes) -> tuple[Any, Any]:
    """q_rotated and k_rotated of torch tensors on one card, in the shapes of the kernel."""
    batch, tokens = q.shape[:2]
    turned = [x.new_empty((batch, at.num_heads, tokens, at.head_dim)) for x in (q, k)]
    launched(
        rotary,
        at.launch,
        lambda dtype: at.programs(batch, tokens, dtype),
        (q, k, angles, tokens, *turned),
    )
    return turned[0], turned[1]
