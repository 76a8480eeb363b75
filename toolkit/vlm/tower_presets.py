"""Published vision towers by themselves, as presets with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.toolkit import models
from edgevlm.toolkit.images.preprocess import ImageRules, Preprocess
from edgevlm.toolkit.models.encoders import clip, mlcd, unicom
from edgevlm.toolkit.vlm.config import ComponentConfig
from edgevlm.toolkit.vlm.presets import clip_pixels, unicom_pixels
from edgevlm.toolkit.vlm.towers import TowerConfig

_B32 = clip.Config(768, 12, 12, 3072, 32, 224, taps=(12,))
_L14_336 = clip.Config(1024, 24, 16, 4096, 14, 336, taps=(24,))
CLIP = {
    "clip-b32": _B32,
    "clip-b16": clip.Config(768, 12, 12, 3072, 16, 224, taps=(12,)),
    "clip-l14": clip.Config(1024, 24, 16, 4096, 14, 224, taps=(24,)),
    "clip-l14-336": _L14_336,
    "mlcd-b32": _B32,  # MLCD's two smaller towers are of CLIP's architecture
    "mlcd-l14-336": _L14_336,
}
MLCD = {
    f"mlcd-bigg-{side}": mlcd.Config(1664, 48, 16, 8192, 14, (side, side), taps=(48,))
    for side in (224, 336, 448)
}


def _tower(name: str, kind: str, config: Any, rule: Preprocess) -> TowerConfig:
    encoder, pooling = ComponentConfig(kind, kind, config), models.tower(kind).POOLINGS[0]
    return TowerConfig(name, kind, encoder, pooling, ImageRules({kind: rule}))


PRESETS: Mapping[str, TowerConfig] = {
    **{n: _tower(n, "unicom", c, unicom_pixels(c.image_size)) for n, c in unicom.PUBLISHED.items()},
    **{n: _tower(n, "clip", c, clip_pixels(c.image_size)) for n, c in CLIP.items()},
    **{n: _tower(n, "mlcd", c, clip_pixels(c.pixels[0])) for n, c in MLCD.items()},
}
