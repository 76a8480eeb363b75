"""What a calibration is asked for, and the windows of text that it sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgevlm.calibration import weight_only
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.errors import CalibrationError, ConfigError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.plan import Block

BLOCKS: tuple[Block, ...] = (32, 64, 128)
_HELD_OUT = 8  # windows, a quarter of the text at most


@dataclass(frozen=True)
class Settings:
    """window: tokens of a sample; windows: the most samples. block: inputs that share a scale in 4
    bits. budget: how much the perplexity of held-out text may grow, 0.05 for 5 %.
    """

    to: str = "int4"
    window: int = 256
    windows: int = 24
    block: int = 32
    budget: float = 0.05


def check(settings: Settings) -> None:
    """Raise ConfigError for settings that cannot be."""
    weight_only.plan(settings.to, "--to")
    if settings.block not in BLOCKS:
        raise ConfigError(f"--block {settings.block} is unknown", hint="known: 32, 64, 128")
    if not (math.isfinite(settings.budget) and settings.budget > 0):
        raise ConfigError(f"--budget {settings.budget} is not a number above 0")
    for name in ("window", "windows"):
        if getattr(settings, name) < 2:
            raise ConfigError(f"--{name} {getattr(settings, name)} is less than 2")


def windows_of(bundle: Bundle, text: Path, settings: Settings) -> tuple[Array, Array]:
    """`windows` of the file `text`. Raises ConfigError and CalibrationError, before any work."""
    check(settings)
    if bundle.manifest.plan.precisions:
        raise ConfigError(
            f"{bundle.path} is quantized already", hint="calibrate the float bundle that it is of"
        )
    longest = bundle.model.lm.config.context
    if settings.window > longest:
        raise ConfigError(
            f"--window {settings.window} does not fit: the model has {longest} positions",
            hint=f"choose at most {longest}",
        )
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CalibrationError(f"{text} is no text in UTF-8") from None
    return windows(bundle.tokenizer().encode(content, special=False), settings)


def windows(ids: list[int], settings: Settings) -> tuple[Array, Array]:
    """Windows of a text to calibrate with, and others to measure on: every fourth."""
    count = len(ids) // settings.window
    if count < 4:
        raise CalibrationError(
            f"the text has {len(ids)} tokens: {count} windows of {settings.window}, at least 4 "
            "are needed",
            hint="give a longer text, or a smaller --window",
        )
    every = np.asarray(ids[: count * settings.window], np.int64).reshape(count, -1)
    held = np.arange(count) % 4 == 3
    return every[~held][: settings.windows], every[held][:_HELD_OUT]
