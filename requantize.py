"""What `build --precision` connects: the bundle's model recorded again in fewer bits, each part in
the number format that runs fastest on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgevlm.engines.build.build import Requantization
    from edgevlm.engines.build.tune import Choice
    from edgevlm.toolkit.target import Target
    from edgevlm.toolkit.vlm.config import ModelConfig

Progress = Callable[[str], None]


def requantization(
    bundle: Path,
    precision: str,
    target: Target,
    progress: Progress,
    *,
    made_by: str,
    tune: bool,
    keep_slower: bool,
) -> Requantization:
    """How a build gets its model in `precision`: int8 and int4 are tuned, other names are fixed.

    tune: measure number formats on this machine, else take the table's. keep_slower: low precision
    where float is faster, too. Raises ConfigError, MissingExtra or BundleError.
    """
    from dataclasses import replace
    from functools import partial

    from edgevlm.calibration import weight_only
    from edgevlm.engines.build.build import Requantization
    from edgevlm.engines.build.second_form import SecondForm
    from edgevlm.export import available
    from edgevlm.toolkit import systems
    from edgevlm.toolkit.checkpoints.layouts.source import Options

    available.check()
    from edgevlm.export import write

    plan = weight_only.plan(precision)
    source = systems.load(bundle, Options())
    prompts, flags, found = None, [], None
    if precision in weight_only.KINDS and not source.plan.precisions:
        found = _choice(source.model, precision, target, progress, tune, keep_slower)
        lm = source.model.lm.name
        plan = weight_only.chosen(lm, found.forms)
        flags = ["--no-tune"] * (not tune) + ["--keep-slower"] * keep_slower
        if found.prompts is not None:
            second = replace(source, plan=weight_only.of_lm(lm, found.prompts))
            writing = partial(write.write_prompt_form, second, made_by=made_by, progress=progress)
            prompts = SecondForm(second.plan, writing)
    source = replace(source, plan=plan)
    return Requantization(
        precision,
        plan,
        partial(write.write_bundle, source, made_by=made_by, progress=progress),
        partial(write.graphs, source),
        tuple(flags),
        found.trials if found else (),
        found.notes if found else (),
        prompts,
    )


def _choice(
    model: ModelConfig,
    kind: str,
    target: Target,
    progress: Progress,
    tune: bool,
    keep_slower: bool,
) -> Choice:
    """Measured where engines for `target` can be built here and have formats to choose from."""
    from edgevlm.engines import backends
    from edgevlm.engines.build import tune as tuner
    from edgevlm.engines.build.timings import Timings
    from edgevlm.export import probe

    if not tune or target.backend != "onnxruntime" or target != backends.backend(target).here():
        return tuner.untuned(model, kind)
    timings = Timings(target, probe.linears)
    return tuner.tuned(model, kind, timings, progress, keep_slower=keep_slower)
