"""What `plan` connects: a source's shapes, plans of number formats, and predictions for devices.

Nothing is read but configurations and sizes, and nothing runs on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgevlm.engines.sizing.predict import Format, Prediction
    from edgevlm.engines.sizing.question import Question
    from edgevlm.engines.sizing.towers import TowerPrediction
    from edgevlm.toolkit.checkpoints.layouts.source import AnySource, Options
    from edgevlm.toolkit.target import Target

FLOATS = ("fp32", "fp16", "bf16")
ALL = "all"


def plan(
    source: str,
    targets: str,
    precisions: str | None = None,
    asked: Question | None = None,
    reading: Options | None = None,
    revision: str | None = None,
) -> list[Prediction] | list[TowerPrediction]:
    """A prediction for every target and precision, as `edgevlm plan` shows them.

    source: a checkpoint folder, a tower's folder or weight file, a model id, a bundle or
    preset:NAME. targets, precisions: names with commas between; "all" are all known devices. Raises
    ToolkitError, UnsupportedError for a device that is named and has no products in a precision.
    """
    from edgevlm import api
    from edgevlm.engines.sizing import rates
    from edgevlm.engines.sizing.predict import Planner, refuse_lacking
    from edgevlm.engines.sizing.question import Question, refuse_for_tower, settled
    from edgevlm.engines.sizing.towers import TowerPlanner
    from edgevlm.toolkit.checkpoints.layouts.source import Source
    from edgevlm.toolkit.target import DEVICES, parse

    reading = reading or api.read_options()
    preset = source.startswith("preset:")
    opened = api.open_source(source, reading, random_weights=preset, revision=revision)
    question = asked or Question()
    planner: Any
    if isinstance(opened, Source):
        planner = Planner(opened.model, settled(opened.model, question))
    else:
        refuse_for_tower(question, source)
        planner = TowerPlanner(opened.model)
    parts = [part.strip() for part in targets.split(",")]
    names = [(n, part) for part in parts for n in (DEVICES if part == ALL else [part])]
    found = []
    for name, part in names:
        target = parse(name)
        for given in formats(opened, target, precisions):
            for machine in rates.machines(target, name, given.dtype):
                if part != ALL:  # of all, those that cannot are noted
                    refuse_lacking(given, machine)
                found.append(planner.predict(given, machine))
    return found


def report(source: str, found: Sequence[Any]) -> tuple[dict[str, object], list[str]]:
    """Data and lines of `edgevlm plan`; found: what `plan` gave."""
    from edgevlm.engines.sizing import predict, towers

    if isinstance(found[0], towers.TowerPrediction):
        return towers.report(source, found)
    return predict.report(source, found)


def formats(opened: AnySource, target: Target, precisions: str | None) -> list[Format]:
    """Number formats by name; without names that of the source, in what the target computes."""
    usual = "fp16" if target.arch.startswith("sm_") else "fp32"
    if precisions is None:
        from edgevlm.engines.sizing.predict import Format

        own = opened.plan
        return [Format("the source's", usual, own) if own.precisions else Format(usual, usual)]
    return [_format(opened, target, name.strip(), usual) for name in precisions.split(",")]


def _format(opened: AnySource, target: Target, name: str, usual: str) -> Format:
    """As `build --precision` makes it: int8 and int4 as they came out on processors with VNNI, the
    language model in 4 bits with a second form for prompts; on cards with one form.
    """
    from edgevlm.calibration import static_plan, weight_only
    from edgevlm.calibration.samples import STATICS, Settings
    from edgevlm.calibration.towers import rounds
    from edgevlm.engines.build import tune
    from edgevlm.engines.sizing.predict import Format
    from edgevlm.toolkit.vlm import towers

    model, lm = opened.model, towers.language_model(opened.model)
    if name in FLOATS:
        return Format(name, name)
    if name in STATICS:
        return Format(name, usual, static_plan.plan_of(model, Settings(name)))
    if lm is None and name == "int4":
        return Format(name, usual, rounds.plan_in_4_bits(model))
    if name not in weight_only.KINDS:
        return Format(name, usual, weight_only.plan_for(name, model))
    plan = weight_only.chosen(model, tune.untuned(model, name, target).forms)
    prompts = None
    if lm is not None and name == "int4" and target.backend == "onnxruntime":
        prompts = weight_only.of_lm(lm.name, "int8_rows")
    return Format(name, usual, plan, prompts)
