"""Costs of whole systems by their images: axes, views, and the arithmetic of the published."""

from __future__ import annotations

import pytest

from edgevlm.toolkit.systems import find, presets
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.toolkit.vlm.cost import count, image_axes


def preset(name: str) -> ModelConfig:
    return find(presets()[name]).PRESETS[name]()


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("convllava-7b-768", 768, 144),
        ("convllava-7b-1024", 1024, 256),
        ("convllava-7b-1536", 1536, 576),
    ],
)
def test_tokens_of_a_convnext_follow_from_its_pixels(name: str, size: int, tokens: int) -> None:
    axes = image_axes(preset(name), 1, tokens)
    assert (axes["height"], axes["width"], axes["tokens"]) == (size, size, tokens)


@pytest.mark.parametrize("name", presets())
def test_every_component_of_every_preset_can_be_counted(name: str) -> None:
    model = preset(name)
    axes = image_axes(model, 1, 16) | {"context": 32, "sequence": 32}
    for part in components.components(model):
        assert count(part, axes).flops > 0, part.name


def test_views_cost_each_as_much() -> None:
    model = preset("llava-next-7b")
    merger = next(p for p in components.components(model) if p.name == "merger")
    one, two, five = (count(merger, image_axes(model, n, 16)).flops for n in (1, 2, 5))
    assert five - two == 3 * (two - one) > 0


def test_a_vision_tower_costs_what_is_published() -> None:
    """CLIP ViT-L/14 at 336: 577 tokens, 23 of 24 blocks of 12 x width^2 products."""
    model = preset("llava-1.5-7b")
    encoder = components.components(model)[0]
    flops = count(encoder, image_axes(model, 1, 576)).flops
    blocks = 23 * 577 * 2 * (12 * 1024 * 1024 + 2 * 577 * 1024)
    assert flops == pytest.approx(blocks, rel=0.02)
