"""ModelConfig: everything that defines a model, as frozen values that can be written as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from edgevlm.toolkit import models
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.images.longest_side import LongestSide
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.strict import MOST_LAYERS, from_plain, to_plain
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


# What is listed one by one, by the names of the fields; other numbers are sizes of tensors.
_LISTED = frozenset(
    "num_layers layers blocks depths mlp_depth num_points num_registers levels taps".split()
)
_MOST_PARTS = 64  # encoders, and branches of a merger
_MOST_SIZE = 1 << 24  # twice the longest context that is published
_MOST_PIXELS = 1 << 14


def _check_sizes(config: Any, where: str, name: str = "") -> None:
    """Raise ConfigError for sizes beyond any model's: they would take minutes, or all memory."""
    if isinstance(config, dict):
        for key, value in config.items():
            _check_sizes(value, f"{where}.{key:.80}", key)
    elif isinstance(config, list):
        if len(config) > MOST_LAYERS:
            raise ConfigError(f"{where} has {len(config)} values, expected at most {MOST_LAYERS}")
        for value in config:
            _check_sizes(value, where, name)
    elif isinstance(config, int):
        most = MOST_LAYERS if name in _LISTED else _MOST_SIZE
        most = _MOST_PIXELS if name.endswith("image_size") or name == "side" else most
        if not -MOST_LAYERS <= config <= most:
            raise ConfigError(f"{where} = {config!r:.40}, expected at most {most}")


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The configuration as JSON objects."""
    plain: dict[str, Any] = to_plain(config)
    if config.segmenter is None:  # so a model without one is described as it always was
        del plain["segmenter"]
    return plain


def from_json(data: dict[str, Any], where: str) -> ModelConfig:
    """The inverse of to_json. Raises ConfigError at the first value that does not fit."""
    outline = from_plain(ModelConfig, data, where)
    if len(outline.encoders) > _MOST_PARTS:
        raise ConfigError(f"{where} has {len(outline.encoders)} encoders, at most {_MOST_PARTS}")

    def typed(component: ComponentConfig, kind: Any) -> ComponentConfig:
        _check_sizes(component.config, f"{where}.{component.name}")
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
