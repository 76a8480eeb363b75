"""UNICOM as its paper and repository describe it, in torch; and a tower's way to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from edgevlm import api
from edgevlm.engines.runtime.embedding import Embedder
from edgevlm.toolkit.ops.vocabulary import Array

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def state_dict(
    width: int, blocks: int, patch: int, grid: int, embedding: int, seed: int
) -> dict[str, Tensor]:
    """Random tensors under the names of deepglint/unicom's files."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        return around + scale * torch.randn(*shape, generator=draw)

    found = {
        "patch_embed.proj.weight": normal(width, 3, patch, patch, scale=0.05),
        "patch_embed.proj.bias": normal(width, scale=0.1),
        "pos_embed": normal(1, grid * grid, width, scale=0.2),
        **_norm("norm", width, normal),
    }
    for i in range(blocks):
        name = f"blocks.{i}"
        found |= _norm(f"{name}.norm1", width, normal) | _norm(f"{name}.norm2", width, normal)
        found[f"{name}.attn.qkv.weight"] = normal(3 * width, width, scale=width**-0.5)
        linears = ("attn.proj", width, width), ("mlp.fc1", 4 * width, width)
        for part, outputs, inputs in (*linears, ("mlp.fc2", width, 4 * width)):
            found[f"{name}.{part}.weight"] = normal(outputs, inputs, scale=inputs**-0.5)
            found[f"{name}.{part}.bias"] = normal(outputs, scale=0.1)
    inputs = grid * grid * width
    found["feature.0.weight"] = normal(width, inputs, scale=inputs**-0.5)
    found["feature.2.weight"] = normal(embedding, width, scale=width**-0.5)
    for number, channels in ((1, width), (3, embedding)):
        found |= _norm(f"feature.{number}", channels, normal)
        found[f"feature.{number}.running_mean"] = normal(channels, scale=0.5)
        found[f"feature.{number}.running_var"] = normal(channels).abs() + 0.05
        found[f"feature.{number}.num_batches_tracked"] = torch.tensor(1234)
    return found


def _norm(name: str, channels: int, normal: Any) -> dict[str, Tensor]:
    weight, bias = normal(channels, scale=0.3, around=1.0), normal(channels, scale=0.3)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


@torch.no_grad()
def embedding(state: Mapping[str, Tensor], heads: int, pixels: Array) -> Array:
    """pixels [B, 3, side, side] -> [B, embedding], in float32 and with running statistics."""
    s = {name: tensor.float() for name, tensor in state.items()}
    patch = s["patch_embed.proj.weight"].shape[-1]
    x = torch.from_numpy(pixels)
    x = F.conv2d(x, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).mT + s["pos_embed"]
    width, i = x.shape[-1], 0
    while f"blocks.{i}.norm1.weight" in s:
        b = {
            k.removeprefix(f"blocks.{i}."): v for k, v in s.items() if k.startswith(f"blocks.{i}.")
        }
        y = F.layer_norm(x, (width,), b["norm1.weight"], b["norm1.bias"], 1e-5)
        q, k, v = (y @ b["attn.qkv.weight"].T).unflatten(-1, (3, heads, width // heads)).unbind(2)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + F.linear(y.transpose(1, 2).flatten(2), b["attn.proj.weight"], b["attn.proj.bias"])
        y = F.layer_norm(x, (width,), b["norm2.weight"], b["norm2.bias"], 1e-5)
        y = F.relu6(F.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x, i = x + F.linear(y, b["mlp.fc2.weight"], b["mlp.fc2.bias"]), i + 1
    x = F.layer_norm(x, (width,), s["norm.weight"], s["norm.bias"], 1e-5).flatten(1)
    for linear, norm in ((0, 1), (2, 3)):
        leaves = ("running_mean", "running_var", "weight", "bias")
        statistics = [s[f"feature.{norm}.{leaf}"] for leaf in leaves]
        x = F.batch_norm(F.linear(x, s[f"feature.{linear}.weight"]), *statistics, eps=2e-5)
    found: Array = x.numpy()
    return found


def unicom_pixels(image: Image.Image, side: int) -> Array:
    """The transform of unicom.load: resize, crop with offsets half to even, RGB, normalise."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    edge = int(side * long / short)
    image = image.resize(
        (side, edge) if width <= height else (edge, side), Image.Resampling.BICUBIC
    )
    left, top = (int(round((n - side) / 2)) for n in image.size)
    image = image.crop((left, top, left + side, top + side)).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    moved = pixels.sub(torch.tensor(MEAN)[:, None, None]).div(torch.tensor(STD)[:, None, None])
    found: Array = moved.numpy()
    return found


def engine_of(source: Path, work: Path, **options: Any) -> Path:
    """A tower's engine for this processor, by the functions that the command line calls."""
    api.export_bundle(source, work / "bundle", **options)
    api.build_engine(work / "bundle", work / "engine")
    return work / "engine"


def embedded(engine: Path, images: list[Path], batch: int = 2) -> Array:
    """Embeddings of images, all of which are good."""
    with Embedder.open(engine, batch=batch) as tower:
        return np.stack([one.vector for one in tower.embed(images) if one.vector is not None])


def near(found: Array, expected: Array, tolerance: float = 1e-4) -> None:
    """Equal to `tolerance`, relative to the largest value."""
    assert found.shape == expected.shape
    scale = max(float(np.abs(expected).max()), 1.0)
    np.testing.assert_allclose(found, expected, atol=tolerance * scale, rtol=0)
