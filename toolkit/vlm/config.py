"""ModelConfig: everything that defines a model, as frozen values that can be written as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgevlm.toolkit import models
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
class ModelConfig:
    """A vision-language model: encoders, one merger, one language model, and its rules."""

    name: str
    system: str
    encoders: tuple[ComponentConfig, ...]
    merger: ComponentConfig
    lm: ComponentConfig
    images: ImageRules
    prompts: PromptRules
    generation: GenerationRules = field(default_factory=GenerationRules)


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The configuration as JSON objects."""
    plain: dict[str, Any] = to_plain(config)
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
    )
