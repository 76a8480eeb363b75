"""What `build --precision` connects: the bundle's model recorded again in fewer bits, each part in
the number format that runs fastest on this machine; and what that makes of the time of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgevlm.engines.build.build import Requantization, Tuning
    from edgevlm.engines.build.latency import Latency
    from edgevlm.engines.build.second_form import SecondForm
    from edgevlm.engines.build.tune import Choice
    from edgevlm.toolkit.bundle.manifest import Bundle
    from edgevlm.toolkit.checkpoints.layouts.source import AnySource, Source
    from edgevlm.toolkit.quantization.plan import PrecisionPlan
    from edgevlm.toolkit.target import Target
    from edgevlm.toolkit.vlm.towers import Model

Progress = Callable[[str], None]


@dataclass(frozen=True)
class How:
    """tune: measure on this machine, else take the table's formats. keep_slower: low precision
    where float is faster, too. keep_float: globs over paths of layers that stay in float.
    """

    tune: bool = True
    keep_slower: bool = False
    keep_float: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """As given on the command line."""
        globs = (word for glob in self.keep_float for word in ("--keep-float", glob))
        switches = {"--no-tune": not self.tune, "--keep-slower": self.keep_slower}
        return (*(name for name, given in switches.items() if given), *globs)


def chosen(
    bundle: Path,
    precision: str | None,
    target: Target,
    progress: Progress,
    made_by: str,
    how: How,
) -> tuple[Requantization | None, Tuning]:
    """What a build records again, and how it chose number formats.

    precision: int8 and int4 are tuned, other names are fixed; with None a bundle that has its
    language model in 4 bits may get a second form for prompts. Raises ConfigError, MissingExtra or
    BundleError.
    """
    from edgevlm.calibration import weight_only
    from edgevlm.engines.build.build import Requantization, Tuning
    from edgevlm.toolkit.bundle.manifest import Bundle

    if precision is None:
        weight_only.refuse_keeping(how.keep_float)
        tuning = _prompts_alone(bundle, target, progress, made_by, how)
        given = Bundle.open(bundle)
        if not given.manifest.plan.precisions:
            return None, _in_halves(given, tuning, target, progress, how)
        return None, _with_kernels(given.model, given.manifest.plan, tuning, target, how)
    from edgevlm.calibration import unsampled
    from edgevlm.engines.lowering import capabilities
    from edgevlm.export import available
    from edgevlm.toolkit import systems
    from edgevlm.toolkit.checkpoints.layouts.source import Options

    available.check()
    from edgevlm.export import write

    source = systems.load_any(bundle, Options())
    plan, tuning = weight_only.plan_for(precision, source.model), Tuning(how.options)
    if precision in weight_only.KINDS and not source.plan.precisions:
        found = _measured(source, precision, target, progress, how)
        plan = weight_only.chosen(source.model, found.forms)
        tuning = _tuning(source, found, how, made_by, progress)
    plan = weight_only.keeping(plan, source.model, how.keep_float)
    source = replace(source, plan=plan)
    dtype = capabilities.of(target).computes_in(Bundle.open(bundle).manifest.dtype)

    def writing(folder: Path) -> None:
        progress("moving outliers from inputs into weights")
        smooth = unsampled.smoothed(source)
        write.write_bundle(smooth, folder, made_by=made_by, progress=progress, dtype=dtype)

    again = Requantization(precision, plan, writing, partial(write.graphs, source, dtype))
    return again, _with_kernels(source.model, plan, tuning, target, how)


def latency(before: Path, after: Path, progress: Progress) -> tuple[Latency, ...]:
    """What the components of a bundle take on this machine, and those of what was calibrated of it.

    Raises MissingExtra, OutputError or OutOfMemory.
    """
    from edgevlm.engines.build import latency as timing

    return timing.measured(before, after, progress)


def _measured(source: AnySource, kind: str, target: Target, progress: Progress, how: How) -> Choice:
    """The fastest formats, or the table's where they are not to be measured or cannot be here."""
    from edgevlm.engines.build import tune
    from edgevlm.engines.build.timings import Timings
    from edgevlm.export import probe

    if not how.tune or not _runs_here(target):
        return tune.untuned(source.model, kind, target)
    timings = Timings(target, probe.linears)
    return tune.tuned(source.model, kind, timings, progress, keep_slower=how.keep_slower)


def _prompts_alone(
    bundle: Path, target: Target, progress: Progress, made_by: str, how: How
) -> Tuning:
    """A second form of a bundle's language model, if its layers are in 4 bits."""
    from edgevlm.engines.build import tune
    from edgevlm.engines.build.build import Tuning
    from edgevlm.engines.build.timings import Timings
    from edgevlm.export import available
    from edgevlm.toolkit import systems
    from edgevlm.toolkit.bundle.manifest import Bundle
    from edgevlm.toolkit.checkpoints.layouts.source import Options
    from edgevlm.toolkit.vlm.towers import language_model

    tuned, opened = how.tune and _runs_here(target), Bundle.open(bundle)
    decodes = language_model(opened.model) is not None
    if not (tuned and decodes and "int4_weights" in opened.manifest.plan.precisions):
        return Tuning(how.options)
    available.check()
    from edgevlm.export import probe

    source = systems.load(bundle, Options())
    found = tune.tuned_prompts(source.model, Timings(target, probe.linears), progress)
    return _tuning(source, found, how, made_by, progress)


def _tuning(source: AnySource, found: Choice, how: How, made_by: str, progress: Progress) -> Tuning:
    from edgevlm.calibration import weight_only
    from edgevlm.engines.build.build import Tuning
    from edgevlm.toolkit.checkpoints.layouts.source import Source
    from edgevlm.toolkit.quantization.plan import Rule

    prompts = None
    if found.prompts is not None and isinstance(source, Source):
        plan = weight_only.of_lm(source.model.lm.name, found.prompts)
        plan = replace(plan, rules=(*plan.rules, *(Rule(x, "float") for x in how.keep_float)))
        prompts = _second_form(replace(source, plan=plan), plan, made_by, progress)
    return Tuning(how.options, found.trials, found.notes, prompts)


def _with_kernels(
    model: Model, plan: PrecisionPlan, tuning: Tuning, target: Target, how: How
) -> Tuning:
    """The same with our own kernels; for attention where they are faster, if that is measured."""
    if not plan.precisions or not _runs_here(target):
        return tuning
    from edgevlm.engines.build import native
    from edgevlm.engines.build.timings import Timings
    from edgevlm.export import available

    available.check()
    from edgevlm.export import probe

    timings = Timings(target, probe.linears) if how.tune else None
    prompts = tuning.prompts.plan if tuning.prompts else None
    kernels, trials = native.chosen(model, plan, timings, prompts)
    return replace(tuning, native=kernels, trials=(*tuning.trials, *trials))


def _in_halves(
    bundle: Bundle, tuning: Tuning, target: Target, progress: Progress, how: How
) -> Tuning:
    """The same for a float bundle: weights stay in 16 bits where that loses nothing, in components
    in which our kernel for them is the faster one, if that is measured.
    """
    if not _runs_here(target):
        return tuning
    progress("comparing the sizes of the bundle's files")
    bundle.check_sizes()  # as weights are looked at before the build reads them all
    from edgevlm.engines.build import halves
    from edgevlm.engines.build.timings import Timings
    from edgevlm.export import available

    available.check()
    from edgevlm.export import probe

    timings = Timings(target, probe.linears) if how.tune else None
    kernels, trials = halves.chosen(bundle, timings, progress)
    return replace(tuning, native=kernels, trials=(*tuning.trials, *trials))


def _second_form(
    source: Source, plan: PrecisionPlan, made_by: str, progress: Progress
) -> SecondForm:
    from edgevlm.calibration import unsampled
    from edgevlm.engines.build.second_form import SecondForm
    from edgevlm.export import write

    def writing(folder: Path) -> None:
        progress(f"{source.model.lm.name}: moving outliers from inputs into weights")
        smooth = unsampled.smoothed(source)
        write.write_prompt_form(smooth, folder, made_by=made_by, progress=progress)

    return SecondForm(plan, writing)


def _runs_here(target: Target) -> bool:
    """Whether formats for `target` can be timed on this machine."""
    from edgevlm.toolkit.target import this_cpu

    return target == this_cpu()
