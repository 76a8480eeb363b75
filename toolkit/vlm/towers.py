"""A vision tower by itself: its configuration beside that of a vision-language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from edgevlm.toolkit import models
from edgevlm.toolkit.errors import ConfigError, UnsupportedError
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.strict import from_plain, to_plain
from edgevlm.toolkit.vlm import config as model_config
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig

KIND = "tower"


@dataclass(frozen=True)
class TowerConfig:
    """One encoder, how its tokens become one embedding an image, and how images become pixels.

    system: the encoder's kind. pooling: one of the encoder file's POOLINGS. kind tells it from a
    vision-language model wherever a configuration is stored.
    """

    name: str
    system: str
    encoder: ComponentConfig
    pooling: str
    images: ImageRules
    kind: Literal["tower"] = "tower"

    @property
    def encoders(self) -> tuple[ComponentConfig, ...]:
        """The encoder alone, as a vision-language model lists its own."""
        return (self.encoder,)

    @property
    def segmenter(self) -> None:
        """It makes no masks."""

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the images that it takes."""
        return self.images.encoders[self.encoder.name].size

    @property
    def channels(self) -> int:
        """Length of an embedding."""
        width: int = self.encoder.config.hidden_sizes[-1]
        return width * (1 + self.pooling.count("+"))


Model = ModelConfig | TowerConfig


def is_tower(data: Any) -> bool:
    """Whether a stored configuration is a tower's."""
    return isinstance(data, dict) and data.get("kind") == KIND


def to_json(model: Model) -> dict[str, Any]:
    """The configuration as JSON objects."""
    plain: dict[str, Any] = to_plain(model)
    return plain


def from_json(data: dict[str, Any], where: str) -> Model:
    """The inverse of to_json. Raises ConfigError at the first value that does not fit."""
    if not is_tower(data):
        return model_config.from_json(data, where)
    outline = from_plain(TowerConfig, data, where)
    encoder = outline.encoder
    file = models.tower(encoder.kind)
    config = from_plain(file.Config, encoder.config, f"{where}.{encoder.name}")
    if outline.pooling not in file.POOLINGS:
        raise ConfigError(f"{where}: pooling = {outline.pooling!r}, expected of {file.POOLINGS}")
    if encoder.name not in outline.images.encoders:
        raise ConfigError(f"{where}: images.encoders lacks {encoder.name}")
    typed = ComponentConfig(encoder.name, encoder.kind, config)
    return TowerConfig(outline.name, outline.system, typed, outline.pooling, outline.images)


def language_model(model: Model) -> ComponentConfig | None:
    """The language model; None for a tower."""
    return model.lm if isinstance(model, ModelConfig) else None


def context_of(model: Model) -> int:
    """The most positions of its KV cache; 0 for a tower, which has none."""
    lm = language_model(model)
    return 0 if lm is None else int(lm.config.context)


def vlm(model: Model, where: str) -> ModelConfig:
    """The model with its language model. Raises UnsupportedError for a tower."""
    if isinstance(model, ModelConfig):
        return model
    raise UnsupportedError(
        f"{where} is a vision tower by itself ({model.name}): it has no language model",
        hint="its embeddings: edgevlm embed ENGINE IMAGES -o features.npz",
    )
