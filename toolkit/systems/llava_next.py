"""LLaVA-NeXT (LLaVA 1.6) and LLaVA-OneVision (Li et al., arXiv 2408.03326): AnyRes tiles.

Reads LLaVA-VL/LLaVA-NeXT's own checkpoint layout (LlavaLlama, LlavaQwen, LlavaMistral) and
Hugging Face's LlavaNextForConditionalGeneration and LlavaOnevisionForConditionalGeneration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.toolkit.checkpoints.layouts import (
    huggingface,
    image_rules,
    original,
    projectors,
    towers,
)
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.images.preprocess import ImageRules, Preprocess, check_tiles
from edgevlm.toolkit.images.tiling import Tiling, TokenArrangement
from edgevlm.toolkit.models.lms import llama
from edgevlm.toolkit.models.mergers import mlp
from edgevlm.toolkit.strict import Reader
from edgevlm.toolkit.vlm import presets
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig

_ORIGINAL = original.OriginalRules(
    "llava_next", projectors.linears, tower_wins=True, lone_newline=True
)


def claims(folder: Path, config: Mapping[str, Any], options: Options) -> bool:
    """Whether a checkpoint folder is of this system: AnyRes over one CLIP or SigLIP."""
    if huggingface.matches(config, "llava_next", "llava_onevision"):
        return True
    if not original.is_original(config) or original.names_mlcd(config):
        return False
    tiled = str(config.get("image_aspect_ratio")).startswith("anyres")
    return tiled and towers.kind_of(config, folder, options) in ("clip", "siglip")


def load(folder: Path, config: Mapping[str, Any], options: Options) -> Source:
    """Read a checkpoint folder of any of the layouts."""
    if original.is_original(config):
        return original.load(folder, config, options, _ORIGINAL)
    huggingface.require(config, folder, "llava_next", "llava_next", "llava_onevision")
    if config["model_type"] == "llava_onevision":
        rules = huggingface.HuggingFaceRules("llava_next", _onevision_images, -1, "full")
    else:
        rules = huggingface.HuggingFaceRules("llava_next", _next_images, ties_by_text=False)
    return huggingface.load(folder, config, options, rules)


def _pinpoints(r: Reader) -> tuple[tuple[int, int], ...]:
    """image_grid_pinpoints are (height, width) in this layout; ours are (width, height)."""
    pairs = image_rules.read_pairs(r.raw("image_grid_pinpoints"), r.where)
    return tuple((w, h) for h, w in pairs)


def _side(r: Reader, encoder: ComponentConfig) -> int:
    """Tokens per row of a view. Raises ConfigError unless its tokens are a square of patches."""
    tokens = encoder.config.tokens
    side = math.isqrt(tokens) if isinstance(tokens, int) else 0
    if side * side != tokens:
        raise ConfigError(
            f"{r.where}: the tower gives {tokens} tokens, tiles need a square of patches",
            hint="set vision_feature_select_strategy to default",
        )
    return side


def _next_images(r: Reader, encoder: ComponentConfig, rule: Preprocess) -> ImageRules:
    r.choice("use_image_newline_parameter", [True], True)
    arrangement = TokenArrangement(
        _side(r, encoder), "spatial", unpad=True, newline=True, rounded=True
    )
    check_tiles(rule, r.where)
    tiling = Tiling(_pinpoints(r), rule.size[0], base=rule.short_edge, resample=rule.resample)
    return ImageRules({encoder.name: rule}, tiling, arrangement)


def _onevision_images(r: Reader, encoder: ComponentConfig, rule: Preprocess) -> ImageRules:
    r.choice("use_image_newline_parameter", [True], True)
    aspect = r.take("vision_aspect_ratio", str, "anyres_max_9")
    match = re.fullmatch(r"anyres_max_(\d+)", aspect)
    if match is None:
        raise ConfigError(
            f"{r.where}: vision_aspect_ratio = {aspect!r} is not implemented",
            hint="implemented: anyres_max_N",
        )
    arrangement = TokenArrangement(
        _side(r, encoder), "spatial", unpad=True, newline=True, max_tiles=int(match[1]),
        rounded=True,
    )  # fmt: skip
    check_tiles(rule, r.where)
    tiling = Tiling(_pinpoints(r), rule.size[0], several="pad", resample=rule.resample)
    return ImageRules({encoder.name: rule}, tiling, arrangement)


def _preset(name: str, lm: llama.Config) -> ModelConfig:
    pinpoints = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    arrangement = TokenArrangement(24, "spatial", unpad=True, newline=True)
    return presets.model(
        name,
        "llava_next",
        [ComponentConfig("clip", "clip", presets.CLIP_L_336)],
        ComponentConfig("merger", "mlp", mlp.Config((1024,), lm.hidden_size)),
        lm,
        ImageRules({"clip": presets.clip_pixels(336)}, Tiling(pinpoints, 336), arrangement),
    )


PRESETS = presets.with_sibling("llava-next-7b", presets.VICUNA_7B, _preset)
