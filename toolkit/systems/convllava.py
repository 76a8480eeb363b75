"""ConvLLaVA (Ge et al., arXiv 2405.15738): a five-stage ConvNeXt, 576 tokens at 1536 x 1536.

Reads alibaba/conv-llava's checkpoint layout with ConvNeXt or UniRepLKNet towers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit.checkpoints.layouts import original, projectors, sam, towers
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.models.lms import llama
from edgevlm.toolkit.models.mergers import mlp
from edgevlm.toolkit.vlm import presets
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig

_TOWERS = ("convnext", "unireplknet")
_RULES = original.OriginalRules("convllava", projectors.linears)


def claims(folder: Path, config: Mapping[str, Any], options: Options) -> bool:
    """Whether a checkpoint folder is of this system: a convolutional tower."""
    if not original.is_original(config) or sam.segments(folder, config):
        return False  # MLCD-Seg's tower need not be there to be looked at
    return towers.kind_of(config, folder, options) in _TOWERS


def load(folder: Path, config: Mapping[str, Any], options: Options) -> Source:
    """Read a checkpoint folder. Raises ConfigError for a tower that is not convolutional."""
    original.require(config, folder, "convllava")
    kind = towers.kind_of(config, folder, options)
    if kind not in _TOWERS:
        raise ConfigError(
            f"{folder}: system 'convllava' needs a tower of kind {' or '.join(_TOWERS)}, "
            f"{config['mm_vision_tower']!r} is {kind}",
            hint="leave --system out, or name another tower with --vision-tower",
        )
    return original.load(folder, config, options, _RULES)


def _preset(name: str, lm: llama.Config, side: int) -> ModelConfig:
    tower = replace(presets.CONVNEXT_L_5, image_size=side)
    return presets.model(
        name,
        "convllava",
        [ComponentConfig("convnext", "convnext", tower)],
        ComponentConfig("merger", "mlp", mlp.Config((tower.dims[-1],), lm.hidden_size)),
        lm,
        ImageRules({"convnext": presets.clip_pixels(side).padded()}),
    )


def _presets() -> dict[str, Callable[[], ModelConfig]]:
    presets_of: dict[str, Callable[[], ModelConfig]] = {}
    for side in (768, 1024, 1536):
        for size, lm in (("7b", presets.VICUNA_7B), ("0.5b", presets.QWEN_0_5B)):
            name = f"convllava-{size}-{side}"
            presets_of[name] = lambda name=name, lm=lm, side=side: _preset(name, lm, side)  # type: ignore[misc]
    return presets_of


PRESETS = _presets()
