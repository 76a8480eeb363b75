"""MLCD in LLaVA-NeXT, and MLCD-Embodied (deepglint/unicom): RoPE2D or CLIP-class towers on Qwen2.

Reads mlcd_vl's checkpoint layout. `--template mlcd_chat` builds prompts as the embodied chat
script does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.toolkit.checkpoints.layouts import original, projectors, sam
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.images.tiling import Tiling, TokenArrangement
from edgevlm.toolkit.models.lms import llama
from edgevlm.toolkit.models.mergers import mlp
from edgevlm.toolkit.vlm import presets
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig

_RULES = original.OriginalRules("mlcd", projectors.linears, tower_wins=True, lone_newline=True)


def claims(folder: Path, config: Mapping[str, Any], options: Options) -> bool:
    """Whether a checkpoint folder is of this system: its tower's name contains "mlcd".

    With SAM inside it is of the system mlcd_seg.
    """
    named = original.is_original(config) and original.names_mlcd(config)
    return named and not sam.segments(folder, config)


def load(folder: Path, config: Mapping[str, Any], options: Options) -> Source:
    """Read a checkpoint folder."""
    return original.load(folder, config, options, _RULES)


def _embodied(name: str, lm: llama.Config) -> ModelConfig:
    grids = tuple((336 * i, 336 * j) for i in range(1, 7) for j in range(1, 7))
    arrangement = TokenArrangement(24, "spatial", unpad=True, newline=True)
    return presets.model(
        name,
        "mlcd",
        [ComponentConfig("clip", "clip", presets.CLIP_L_336)],
        ComponentConfig("merger", "mlp", mlp.Config((1024,), lm.hidden_size)),
        lm,
        ImageRules({"clip": presets.clip_pixels(336)}, Tiling(grids, 336), arrangement),
    )


def _bigg(name: str, lm: llama.Config) -> ModelConfig:
    grids = ((448, 896), (896, 448), (896, 896), (1344, 448), (448, 1344))
    arrangement = TokenArrangement(32, "spatial", unpad=True, newline=True)
    return presets.model(
        name,
        "mlcd",
        [ComponentConfig("mlcd", "mlcd", presets.MLCD_BIGG_448)],
        ComponentConfig("merger", "mlp", mlp.Config((1664,), lm.hidden_size)),
        lm,
        ImageRules({"mlcd": presets.clip_pixels(448)}, Tiling(grids, 448), arrangement),
    )


PRESETS = {
    **presets.with_sibling("mlcd-embodied-7b", presets.QWEN_7B, _embodied),
    **presets.with_sibling("mlcd-bigg-448-7b", presets.QWEN_7B, _bigg),
}
