"""ModelConfig: everything that defines a model, as frozen values that can be written as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from edgevlm.toolkit import models
from edgevlm.toolkit.images.longest_side import LongestSide
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.strict import from_plain, to_plain
from edgevlm.toolkit.text.prompts import PromptRules
from edgevlm.toolkit.vlm.generation import GenerationRules


@dataclass(frozen=True)
class ComponentConfig:
    """One architecture in use: `kind` is its file in toolkit/models, `name` its role here."""

    name: str
    kind: str
    config: Any


@dataclass(frozen=True)
class Segmenter:
    """What makes masks after an answer, one for each of its tokens `token`.

    decoder: takes the language model's state at the token, and what `encoder` makes of `pixels`,
    which are the image's own for this. one_size: whether all masks have the size of the largest
    image (the quirk one-mask-size).
    """

    token: str
    encoder: ComponentConfig
    decoder: ComponentConfig
    pixels: LongestSide
    one_size: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language model: encoders, one merger, one language model, and its rules.

    segmenter: None for a model whose answers are text alone.
    """

    name: str
    system: str
    encoders: tuple[ComponentConfig, ...]
    merger: ComponentConfig
    lm: ComponentConfig
    images: ImageRules
    prompts: PromptRules
    generation: GenerationRules = field(default_factory=GenerationRules)
    segmenter: Segmenter | None = None


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The configuration as JSON objects."""
    plain: dict[str, Any] = to_plain(config)
    if config.segmenter is None:  # so a model without one is described as it always was
        del plain["segmenter"]
    return plain


def from_json(data: dict[str, Any], where: str) -> ModelConfig:
    """The inverse of to_json. Raises ConfigError at the first value that does not fit."""
    outline = from_plain(ModelConfig, data, where)

    def typed(component: ComponentConfig, kind: Any) -> ComponentConfig:
        config = from_plain(kind, component.config, f"{where}.{component.name}")
        return ComponentConfig(component.name, component.kind, config)

    return ModelConfig(
        outline.name,
        outline.system,
        tuple(typed(e, models.encoder(e.kind).Config) for e in outline.encoders),
        typed(outline.merger, models.merger(outline.merger.kind).Config),
        typed(outline.lm, models.lm(outline.lm.kind).Config),
        outline.images,
        outline.prompts,
        outline.generation,
        _segmenter(outline.segmenter, typed),
    )


def _segmenter(
    outline: Segmenter | None, typed: Callable[[ComponentConfig, Any], ComponentConfig]
) -> Segmenter | None:
    if outline is None:
        return None
    return replace(
        outline,
        encoder=typed(outline.encoder, models.encoder(outline.encoder.kind).Config),
        decoder=typed(outline.decoder, models.segmenter(outline.decoder.kind).Config),
    )
