"""Random inputs for a fused op, and what the reference makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgevlm.engines.plugins.catalogue import Site
from edgevlm.engines.plugins.layer_merge.spec import Attributes as LayerMerge
from edgevlm.engines.plugins.ms_deform_attn.spec import Attributes as MSDeformAttn
from edgevlm.engines.plugins.rotary.spec import Attributes as Rotary
from edgevlm.toolkit.checkpoints.safetensors_io import from_bfloat16, to_bfloat16
from edgevlm.toolkit.ops import decompositions
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights


@dataclass(frozen=True)
class Trial:
    """inputs: as the kernel's pointers, in order, in the formats that it reads, bf16 as its bits.
    expected: what its results should be, in float32, from the very numbers of the inputs.
    """

    inputs: tuple[Array, ...]
    expected: tuple[Array, ...]


def trial(site: Site, dtype: str, generator: np.random.Generator) -> Trial:
    """A call of a site on random numbers."""
    values = drawn(site, generator)
    pointers = site.launch(dtype).pointers
    formats = {name: site.launch(dtype).formats.get(name, dtype) for name in pointers}
    inputs = {name: stored(values[name], formats[name]) for name in pointers}
    seen = {name: floats(array, formats[name]) for name, array in inputs.items()}
    return Trial(tuple(inputs.values()), _EXPECTED[site.op](site, seen))


def drawn(site: Site, generator: np.random.Generator) -> dict[str, Array]:
    """Random numbers for what a site's kernel reads, in float32, by the names of its pointers."""
    return _DRAWN[site.op](site, generator)


def stored(array: Array, dtype: str) -> Array:
    """float32 as a kernel reads it."""
    if dtype == "bf16":
        return to_bfloat16(array)
    return array.astype(np.float16 if dtype == "fp16" else np.float32)


def floats(array: Array, dtype: str) -> Array:
    """The same, back in float32."""
    return from_bfloat16(array) if dtype == "bf16" else array.astype(np.float32)


def difference(found: Array, expected: Array) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _normal(generator: np.random.Generator, *shape: int) -> Array:
    return generator.normal(size=shape).astype(np.float32)


def _drawn_deform(site: Site, generator: np.random.Generator) -> dict[str, Array]:
    """Many points lie outside the grid, one far outside."""
    at, (images, queries) = site.at, site.sizes
    assert isinstance(at, MSDeformAttn)
    each = at.num_heads * at.levels * at.num_points
    cells = at.levels * at.height * at.width
    offsets = 2 * _normal(generator, images, queries, 2 * each)
    offsets[0, 0, :2] = 60000, -60000
    return {
        "value": _normal(generator, images, cells, at.num_heads * at.head_dim),
        "offsets": offsets,
        "scores": _normal(generator, images, queries, each),
        "reference": generator.random((queries, 2), np.float32),
    }


def _expected_deform(site: Site, x: Mapping[str, Array]) -> tuple[Array, ...]:
    at = site.at
    assert isinstance(at, MSDeformAttn)
    y = NumpyOps().ms_deform_attn(
        x["value"],
        x["offsets"],
        x["scores"],
        grid=(at.height, at.width),
        num_levels=at.levels,
        num_heads=at.num_heads,
        num_points=at.num_points,
        head_dim=at.head_dim,
        reference=x["reference"],
    )
    return (y,)


def _drawn_merge(site: Site, generator: np.random.Generator) -> dict[str, Array]:
    """Levels have a mean of many deviations, as those of encoders do."""
    at, (tokens,) = site.at, site.sizes
    assert isinstance(at, LayerMerge)
    n, hidden = at.levels, at.hidden_size
    return {
        "x": _normal(generator, 1, tokens, n * hidden) + 8,
        "norm_weight": 1 + _normal(generator, n, hidden) / 4,
        "norm_bias": _normal(generator, n, hidden) / 4,
        "scale": _normal(generator, n),
        "weight": _normal(generator, n * hidden, at.outputs) / np.float32(hidden**0.5),
        "bias": _normal(generator, n, at.outputs),
    }


def _expected_merge(site: Site, x: Mapping[str, Array]) -> tuple[Array, ...]:
    at = site.at
    assert isinstance(at, LayerMerge)
    names = {"norm.weight": "norm_weight", "norm.bias": "norm_bias", "scale": "scale"}
    names |= {"linear.weight": "weight", "linear.bias": "bias"}
    tensors = {ours: x[theirs] for ours, theirs in names.items()}
    levels = np.split(x["x"], at.levels, axis=2)
    return (decompositions.layer_merge(NumpyOps(), levels, Weights(tensors), at.epsilon),)


def _drawn_rotary(site: Site, generator: np.random.Generator) -> dict[str, Array]:
    """Angles of many turns."""
    at, (images, tokens) = site.at, site.sizes
    assert isinstance(at, Rotary)
    shape = (images, tokens, at.num_heads * at.head_dim)
    turned = {name: _normal(generator, *shape) for name in "qk"}
    return turned | {"angles": 100 * _normal(generator, tokens, at.head_dim // 2)}


def _expected_rotary(site: Site, x: Mapping[str, Array]) -> tuple[Array, ...]:
    at = site.at
    assert isinstance(at, Rotary)
    cos, sin = np.cos(x["angles"]), np.sin(x["angles"])
    turned = []
    for name in "qk":
        heads = x[name].reshape(*x[name].shape[:2], at.num_heads, -1).transpose(0, 2, 1, 3)
        a, b = np.split(heads, 2, axis=-1)
        turned.append(np.concatenate([a * cos - b * sin, b * cos + a * sin], -1))
    return tuple(turned)


_DRAWN: Mapping[str, Callable[[Site, np.random.Generator], dict[str, Array]]] = {
    "MSDeformAttn": _drawn_deform,
    "LayerMerge": _drawn_merge,
    "RotaryAttention": _drawn_rotary,
}
_EXPECTED: Mapping[str, Callable[[Site, Mapping[str, Array]], tuple[Array, ...]]] = {
    "MSDeformAttn": _expected_deform,
    "LayerMerge": _expected_merge,
    "RotaryAttention": _expected_rotary,
}
