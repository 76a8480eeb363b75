"""LLaVA-1.5 (Liu et al., arXiv 2310.03744): CLIP's patch tokens through an MLP into Vicuna.

Reads haotian-liu/LLaVA's own checkpoint layout and Hugging Face's LlavaForConditionalGeneration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.toolkit.checkpoints.layouts import huggingface, original, projectors, towers
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.models.lms import llama
from edgevlm.toolkit.models.mergers import mlp
from edgevlm.toolkit.vlm import presets
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig

_ORIGINAL = original.OriginalRules("llava", projectors.linears)
_HUGGINGFACE = huggingface.HuggingFaceRules("llava", huggingface.one_view)


def claims(folder: Path, config: Mapping[str, Any], options: Options) -> bool:
    """Whether a checkpoint folder is of this system: one level of one CLIP or SigLIP, one view."""
    if huggingface.matches(config, "llava"):
        return True
    if not original.is_original(config) or original.names_mlcd(config):
        return False
    levels = towers.selected(config.get("mm_vision_select_layer")) or ()
    tiled = str(config.get("image_aspect_ratio")).startswith("anyres")
    encoder = towers.kind_of(config, folder, options)
    return len(levels) <= 1 and not tiled and encoder in ("clip", "siglip")


def load(folder: Path, config: Mapping[str, Any], options: Options) -> Source:
    """Read a checkpoint folder of either layout."""
    if original.is_original(config):
        return original.load(folder, config, options, _ORIGINAL)
    huggingface.require(config, folder, "llava", "llava")
    return huggingface.load(folder, config, options, _HUGGINGFACE)


def _preset(name: str, lm: llama.Config) -> ModelConfig:
    return presets.model(
        name,
        "llava",
        [ComponentConfig("clip", "clip", presets.CLIP_L_336)],
        ComponentConfig("merger", "mlp", mlp.Config((1024,), lm.hidden_size)),
        lm,
        ImageRules({"clip": presets.clip_pixels(336).padded()}),
    )


PRESETS = {
    "llava-1.5-7b": lambda: _preset("llava-1.5-7b", presets.VICUNA_7B),
    "llava-qwen2-0.5b": lambda: _preset("llava-qwen2-0.5b", presets.QWEN_0_5B),
}
