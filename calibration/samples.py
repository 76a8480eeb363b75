"""What a calibration is asked for, and the windows of text that it sees."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from edgevlm.calibration import weight_only
from edgevlm.calibration.histogram import METHODS
from edgevlm.calibration.rounding import METHODS as OF_4_BITS
from edgevlm.calibration.rounding import Method
from edgevlm.toolkit.bundle.atomic import refuse_existing, refuse_source
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.errors import CalibrationError, ConfigError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.plan import Block, Precision

STATIC = "int8-static"
# What has inputs in 8 bits too, in steps known beforehand: the precision in plans.
STATICS: Mapping[str, Precision] = {STATIC: "int8", "fp8": "fp8"}
_STATIC = ("range", "smooth", "bias_correction", "keep_float", "samples")
_IN_4_BITS = ("method", "block", "zero_points")
# What a tower by itself takes where weights are calibrated: it sees images then too.
_OF_TOWERS: Mapping[str, tuple[str, ...]] = {
    "int8": ("samples", "keep_float", "smooth"),
    "int4": ("samples", "keep_float"),
}
BUDGET = 0.05  # of weights alone, unless another is given
BLOCKS: tuple[Block, ...] = (32, 64, 128)
_HELD_OUT = 8  # windows, a quarter of the text at most


@dataclass(frozen=True)
class Settings:
    """window: tokens of a sample of text; windows: the most of them.

    budget: how much perplexity may grow, 0.05 for 5 %; None for BUDGET, and none in static INT8
    and FP8. Of weights alone: method, how 4 bits are chosen (rounding.py); block, inputs that share
    a scale in 4 bits; zero_points, whether such blocks have zero points of their own. Of the other
    two: range, the method (histogram.py); smooth, SmoothQuant's alpha; keep_float, globs over paths
    of layers; samples, the most images or prompts. Of a tower by itself the budget is how much
    embeddings may turn, the mean of 1 - cosine.
    """

    to: str = "int4"
    window: int = 256
    windows: int = 24
    method: Method = "awq+gptq"
    block: int = 32
    zero_points: bool = False
    budget: float | None = None
    range: str = "mse"
    smooth: float | None = None
    bias_correction: bool = False
    keep_float: tuple[str, ...] = ()
    samples: int = 64


def budget_of(settings: Settings) -> float:
    """The budget of weights alone."""
    return BUDGET if settings.budget is None else settings.budget


def check(settings: Settings, *, tower: bool = False) -> None:
    """Raise ConfigError for settings that cannot be; tower: of a vision tower by itself."""
    known = (*weight_only.KINDS, *STATICS)
    if settings.to not in known:
        raise ConfigError(f"--to {settings.to!r} is unknown", hint=f"known: {', '.join(known)}")
    _refuse_others(settings, _OF_TOWERS.get(settings.to, ()) if tower else ())
    if settings.range not in METHODS:
        raise ConfigError(
            f"--range {settings.range!r} is unknown", hint=f"known: {', '.join(METHODS)}"
        )
    if settings.smooth is not None and not 0 < settings.smooth < 1:
        raise ConfigError(f"--smooth {settings.smooth} is not between 0 and 1", hint="0.5 is usual")
    if settings.method not in OF_4_BITS:
        raise ConfigError(
            f"--method {settings.method!r} is unknown", hint=f"known: {', '.join(OF_4_BITS)}"
        )
    if settings.block not in BLOCKS:
        raise ConfigError(f"--block {settings.block} is unknown", hint="known: 32, 64, 128")
    budget = settings.budget
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise ConfigError(f"--budget {budget} is not a number above 0")
    for name in ("window", "windows", "samples"):
        if getattr(settings, name) < 2:
            raise ConfigError(f"--{name} {getattr(settings, name)} is less than 2")


def _refuse_others(settings: Settings, known: Collection[str]) -> None:
    """Raise ConfigError for options that have no meaning for what is asked, unless `known`."""
    static, in_4_bits = settings.to in STATICS, settings.to == "int4"
    foreign = {*(() if static else _STATIC), *(() if in_4_bits else _IN_4_BITS)} - {*known}
    for option in fields(Settings):
        name = option.name
        if name in foreign and getattr(settings, name) != option.default:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} has no meaning for --to {settings.to}", hint=f"leave {flag} out"
            )


def check_bundle(bundle: Bundle) -> None:
    """Raise ConfigError unless a bundle is in float."""
    if bundle.manifest.plan.precisions:
        raise ConfigError(
            f"{bundle.path} is quantized already", hint="calibrate the float bundle that it is of"
        )


def opened(path: Path, out: Path, *, force: bool) -> Bundle:
    """The whole float bundle at `path`. Raises ToolkitError where it is none, or for `out`."""
    bundle = Bundle.open(path)
    check_bundle(bundle)
    bundle.verify()
    refuse_source(out, path)
    refuse_existing(out, force=force)
    return bundle


def block_of(settings: Settings) -> Block:
    """The block of weights in 4 bits, as plans have it."""
    return next(block for block in BLOCKS if block == settings.block)


def windows_of(bundle: Bundle, text: Path, settings: Settings) -> tuple[Array, Array]:
    """`windows` of the file `text`. Raises ConfigError and CalibrationError, before any work."""
    check(settings)
    check_bundle(bundle)
    longest = bundle.vlm.lm.config.context
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
    """Windows of a text to calibrate with, and others to measure on: every fourth. Both int64
    [windows, tokens]. Raises CalibrationError for a text that is too short.
    """
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
