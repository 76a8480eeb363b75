"""A bundle as a source: recorded again from its own manifest and weights."""

from __future__ import annotations

from pathlib import Path

from edgevlm.toolkit.bundle.manifest import GOLDENS, TOKENIZER, Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source, with_context
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.strict import read_text
from edgevlm.toolkit.vlm.components import components


def load(folder: Path, options: Options) -> Source:
    """The model of a bundle. Raises BundleError if a file is missing or was cut short."""
    bundle = Bundle.open(folder)
    bundle.check_sizes()
    if options.system not in (None, bundle.model.system):
        raise ConfigError(
            f"{folder} is a bundle of system {bundle.model.system}, not {options.system}",
            hint="leave --system out",
        )
    if options.base is not None:
        raise ConfigError(f"{folder} is a bundle; --base is for checkpoints", hint="leave it out")
    lm = with_context(bundle.model.lm, options.max_context)
    model = type(bundle.model)(**{**vars(bundle.model), "lm": lm})
    weights = {component.name: bundle.tensors(component.name) for component in components(model)}
    text = read_text(folder / TOKENIZER)
    origin = {**bundle.manifest.source, "rerecorded_from": bundle.sha256}
    return Source(model, weights, text, origin, bundle.manifest.plan, folder / GOLDENS)
