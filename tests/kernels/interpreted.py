"""Every kernel on small tensors in Triton's interpreter, against the reference.

    TRITON_INTERPRET=1 python -m tests.kernels.interpreted

prints, as JSON, the largest difference of each case in each number format as a share of the
largest value. Kernels read the variable when they are imported, hence a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from edgevlm.engines.plugins.layer_merge import kernel as merging
from edgevlm.engines.plugins.layer_merge import spec as merge
from edgevlm.engines.plugins.ms_deform_attn import kernel as deforming
from edgevlm.engines.plugins.ms_deform_attn import spec as deform
from edgevlm.engines.plugins.rotary import kernel as rotating
from edgevlm.engines.plugins.rotary import spec as rotary
from edgevlm.toolkit.ops import decompositions
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights

FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Draw = Callable[..., Any]


def _array(x: Any) -> Array:
    return np.asarray(x.float().numpy())


def deformed(draw: Draw, at: deform.Attributes, batch: int, queries: int) -> list[tuple[Any, Any]]:
    """Deformable attention; many points lie outside the grid, one far outside."""
    each = at.num_heads * at.levels * at.num_points
    cells = at.levels * at.height * at.width
    value = draw(batch, cells, at.num_heads * at.head_dim)
    offsets = 2 * draw(batch, queries, 2 * each)
    offsets[0, 0, 0] = 60000.0
    scores = draw(batch, queries, each)
    reference = torch.rand(queries, 2, generator=torch.Generator().manual_seed(1))
    found = deforming.run(value, offsets, scores, reference, at)
    expected = NumpyOps().ms_deform_attn(
        _array(value),
        _array(offsets),
        _array(scores),
        grid=(at.height, at.width),
        num_levels=at.levels,
        num_heads=at.num_heads,
        num_points=at.num_points,
        head_dim=at.head_dim,
        reference=_array(reference),
    )
    return [(found, expected)]


def merged(draw: Draw, at: merge.Attributes, batch: int, tokens: int) -> list[tuple[Any, Any]]:
    """Levels with a mean of many deviations, as encoders' have."""
    n, hidden = at.levels, at.hidden_size
    x = draw(batch, tokens, n * hidden) + 8
    norm = 1 + draw(n, hidden) / 4, draw(n, hidden) / 4
    scale = draw(n)
    linear = draw(n * hidden, at.outputs) / hidden**0.5, draw(n, at.outputs)
    found = merging.run(x, *norm, scale, *linear, at)
    names = ("norm.weight", "norm.bias", "scale", "linear.weight", "linear.bias")
    tensors = dict(zip(names, map(_array, (*norm, scale, *linear)), strict=True))
    levels = np.split(_array(x), n, axis=2)
    expected = decompositions.layer_merge(NumpyOps(), levels, Weights(tensors), at.epsilon)
    return [(found, expected)]


def rotated(draw: Draw, at: rotary.Attributes, batch: int, tokens: int) -> list[tuple[Any, Any]]:
    """Queries and keys, by angles of up to a thousand."""
    q, k = (draw(batch, tokens, at.num_heads * at.head_dim) for _ in range(2))
    angles = 300 * torch.randn(tokens, at.head_dim // 2, generator=torch.Generator().manual_seed(2))
    found = rotating.run(q, k, angles, at)
    cos, sin = np.cos(_array(angles)), np.sin(_array(angles))
    pairs = []
    for x, y in zip((q, k), found, strict=True):
        heads = _array(x).reshape(batch, tokens, at.num_heads, -1).transpose(0, 2, 1, 3)
        a, b = np.split(heads, 2, axis=-1)
        pairs.append((y, np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)))
    return pairs


Case = Callable[[Draw], "list[tuple[Any, Any]]"]
CASES: Mapping[str, Case] = {
    "ms_deform_attn": lambda draw: deformed(draw, deform.Attributes(2, 2, 8, 3, 3, 4), 2, 6),
    "ms_deform_attn, odd sizes": lambda draw: deformed(
        draw, deform.Attributes(3, 1, 5, 1, 4, 4), 1, 19
    ),
    "layer_merge": lambda draw: merged(draw, merge.Attributes(3, 40, 1e-5, 24), 2, 5),
    "layer_merge, thirty levels": lambda draw: merged(
        draw, merge.Attributes(30, 16, 1e-5, 70), 1, 3
    ),
    "rotary": lambda draw: rotated(draw, rotary.Attributes(2, 8), 2, 5),
    "rotary, odd sizes": lambda draw: rotated(draw, rotary.Attributes(5, 26), 1, 17),
}


def differences(case: Case, dtype: str) -> float:
    """The largest difference as a share of the largest value."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(FORMATS[dtype])

    return max(
        float(np.abs(_array(found) - expected).max() / np.abs(expected).max())
        for found, expected in case(draw)
    )


if __name__ == "__main__":
    print(json.dumps({f"{n}, {d}": differences(c, d) for n, c in CASES.items() for d in FORMATS}))
