"""A bundle as a source: recorded again from its own manifest and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgevlm.toolkit.bundle.manifest import GOLDENS, TOKENIZER, Bundle, Tensors
from edgevlm.toolkit.checkpoints.layouts.source import (
    AnySource,
    Options,
    Source,
    TowerSource,
    with_context,
)
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.strict import read_text
from edgevlm.toolkit.vlm import towers
from edgevlm.toolkit.vlm.components import components
from edgevlm.toolkit.vlm.towers import TowerConfig


def load(folder: Path, options: Options) -> Source:
    """The model of a bundle. Raises BundleError if a file is missing or was cut short, and
    UnsupportedError for a vision tower by itself.
    """
    bundle = _opened(folder, options)
    vlm = towers.vlm(bundle.model, f"bundle {folder}")
    lm = with_context(vlm.lm, options.max_context)
    model = type(vlm)(**{**vars(vlm), "lm": lm})
    text = read_text(folder / TOKENIZER)
    return Source(model, _weights(bundle), text, *_rest(bundle))


def load_any(folder: Path, options: Options) -> AnySource:
    """The same, or the tower that a bundle holds by itself. Raises ConfigError for --max-context
    there.
    """
    bundle = _opened(folder, options)
    if not isinstance(bundle.model, TowerConfig):
        return load(folder, options)
    if options.max_context is not None:
        raise ConfigError(f"{folder} holds a tower, --max-context is for language models")
    return TowerSource(bundle.model, _weights(bundle), *_rest(bundle))


def _opened(folder: Path, options: Options) -> Bundle:
    bundle = Bundle.open(folder)
    bundle.check_sizes()
    if options.system not in (None, bundle.model.system):
        raise ConfigError(
            f"{folder} is a bundle of system {bundle.model.system}, not {options.system}",
            hint="leave --system out",
        )
    if options.base is not None:
        raise ConfigError(f"{folder} is a bundle; --base is for checkpoints", hint="leave it out")
    return bundle


def _weights(bundle: Bundle) -> dict[str, Tensors]:
    parts = components(bundle.model)
    return {component.name: bundle.tensors(component.name) for component in parts}


def _rest(bundle: Bundle) -> tuple[dict[str, Any], PrecisionPlan, Path]:
    """Origin, plan and goldens."""
    origin = {**bundle.manifest.source, "rerecorded_from": bundle.sha256}
    return origin, bundle.manifest.plan, bundle.path / GOLDENS
