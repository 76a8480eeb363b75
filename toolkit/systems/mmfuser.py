"""MMFuser (Cao et al., arXiv 2410.11829): LLaVA-1.5 whose projector fuses five levels of CLIP.

Reads yuecao0119/MMFuser's checkpoint layout. All tensors are read under the names that they are
stored with; the original's loader renames those with "gamma" and undoes that for two shard counts
only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.toolkit.checkpoints.layouts import original, projectors, towers
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.models.lms import llama
from edgevlm.toolkit.models.mergers import mmfuser
from edgevlm.toolkit.strict import Reader
from edgevlm.toolkit.vlm import presets
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig

LEVELS = (3, 8, 13, 18, 23)


def claims(folder: Path, config: Mapping[str, Any], options: Options) -> bool:
    """Whether a checkpoint folder is of this system: several levels of CLIP are selected."""
    levels = towers.selected(config.get("mm_vision_select_layer")) or ()
    return original.is_original(config) and len(levels) > 1


def load(folder: Path, config: Mapping[str, Any], options: Options) -> Source:
    """Read a checkpoint folder."""
    return original.load(folder, config, options, _RULES)


def _taps(selected: tuple[int, ...]) -> tuple[int, ...]:
    """The first four levels are keys and values, the last one is the query, as in the original.

    Levels between them are ignored. Raises ConfigError for fewer than five levels.
    """
    if len(selected) <= mmfuser.LEVELS:
        raise ConfigError(
            f"mm_vision_select_layer {list(selected)} has {len(selected)} levels, the fuser "
            f"needs {mmfuser.LEVELS + 1}",
            hint="four key/value levels and one query level, as in [-22, -17, -12, -7, -2]",
        )
    return (*selected[: mmfuser.LEVELS], selected[-1])


def _merger(r: Reader, encoder: ComponentConfig, outputs: int) -> ComponentConfig:
    config = encoder.config
    if getattr(config, "class_token", False) or not isinstance(config.tokens, int):
        raise ConfigError(
            f"{r.where}: the fuser needs a square grid of patches",
            hint="set mm_vision_select_feature to patch",
        )
    layers, blocks = projectors.depth(r, projectors.read_name(r, encoder))
    if blocks:
        raise ConfigError(f"{r.where}: residual blocks after the fuser are not implemented")
    projectors.check_identity(r, layers, config.hidden_size, outputs)
    side = math.isqrt(config.tokens)
    return ComponentConfig(
        "merger", "mmfuser", mmfuser.Config(config.hidden_size, side, outputs, layers)
    )


_RULES = original.OriginalRules("mmfuser", _merger, taps=_taps)


def _preset(name: str, lm: llama.Config) -> ModelConfig:
    return presets.model(
        name,
        "mmfuser",
        [ComponentConfig("clip", "clip", presets.tapped(presets.CLIP_L_336, *LEVELS))],
        ComponentConfig("merger", "mmfuser", mmfuser.Config(1024, 24, lm.hidden_size)),
        lm,
        ImageRules({"clip": presets.clip_pixels(336).padded()}),
    )


PRESETS = presets.with_sibling("mmfuser-7b", presets.VICUNA_7B, _preset)
