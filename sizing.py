"""What `plan` connects: a source's shapes, plans of number formats, and predictions for devices.

Nothing is read but configurations and sizes, and nothing runs on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgevlm.engines.sizing.predict import Asked, Format, Prediction
    from edgevlm.toolkit.checkpoints.layouts.source import Options
    from edgevlm.toolkit.quantization.plan import PrecisionPlan
    from edgevlm.toolkit.target import Target
    from edgevlm.toolkit.vlm.config import ModelConfig

FLOATS = ("fp32", "fp16", "bf16")
STATIC = "int8-static"
CONTEXT = 4096  # positions that are planned for unless the model has fewer
ALL = "all"


@dataclass(frozen=True)
class Question:
    """What is asked, as the options of `plan` say; max_context: None for CONTEXT or the model's."""

    max_context: int | None = None
    prompt_tokens: int = 32
    max_tokens: int = 64
    image_size: str = "640x480"


def plan(
    source: str,
    targets: str,
    precisions: str | None = None,
    asked: Question | None = None,
    reading: Options | None = None,
    revision: str | None = None,
) -> list[Prediction]:
    """A prediction for every target and precision, as `edgevlm plan` shows them.

    source: a checkpoint folder, a model id, a bundle or preset:NAME. targets, precisions: names
    with commas between; "all" are all known devices. Raises ToolkitError.
    """
    from edgevlm import api
    from edgevlm.engines.sizing import rates
    from edgevlm.engines.sizing.predict import Planner
    from edgevlm.toolkit.target import DEVICES, parse
    from edgevlm.toolkit.vlm import towers

    reading = reading or api.read_options()
    preset = source.startswith("preset:")
    opened = api.open_source(source, reading, random_weights=preset, revision=revision)
    model = towers.vlm(opened.model, source)
    parts = [part.strip() for part in targets.split(",")]
    names = [name for part in parts for name in (DEVICES if part == ALL else [part])]
    planner = Planner(model, _settled(asked or Question(), model))
    found = []
    for name in names:
        target = parse(name)
        for given in formats(model, target, precisions, opened.plan):
            machines = rates.machines(target, name, given.dtype)
            found += [planner.predict(given, machine) for machine in machines]
    return found


def formats(
    model: ModelConfig, target: Target, precisions: str | None, own: PrecisionPlan
) -> list[Format]:
    """Number formats by name; without names that of the source, in what the target computes."""
    usual = "fp16" if target.arch.startswith("sm_") else "fp32"
    if precisions is None:
        from edgevlm.engines.sizing.predict import Format

        return [Format("the source's", usual, own) if own.precisions else Format(usual, usual)]
    return [_format(model, target, name.strip(), usual) for name in precisions.split(",")]


def _format(model: ModelConfig, target: Target, name: str, usual: str) -> Format:
    """As `build --precision` makes it: int8 and int4 as they came out on processors with VNNI, the
    language model in 4 bits with a second form for prompts; on cards with one form.
    """
    from edgevlm.calibration import static_plan, weight_only
    from edgevlm.calibration.samples import Settings
    from edgevlm.engines.build import tune
    from edgevlm.engines.sizing.predict import Format

    if name in FLOATS:
        return Format(name, name)
    if name == STATIC:
        return Format(name, usual, static_plan.plan_of(model, Settings(STATIC)))
    if name not in weight_only.KINDS:
        return Format(name, usual, weight_only.plan(name))
    plan = weight_only.chosen(model, tune.untuned(model, name, target).forms)
    prompts = None
    if name == "int4" and target.backend == "onnxruntime":
        prompts = weight_only.of_lm(model.lm.name, "int8_rows")
    return Format(name, usual, plan, prompts)


def _settled(asked: Question, model: ModelConfig) -> Asked:
    """The question as numbers. Raises ConfigError or InputError for what cannot be."""
    from edgevlm.engines.sizing.predict import Asked
    from edgevlm.toolkit.errors import ConfigError, InputError

    longest = int(model.lm.config.context)
    context = min(CONTEXT, longest) if asked.max_context is None else asked.max_context
    if not 1 <= context <= longest:
        raise ConfigError(
            f"--max-context {context} does not fit: the model has {longest} positions",
            hint=f"choose 1 to {longest}",
        )
    for name in ("prompt_tokens", "max_tokens"):
        if (value := getattr(asked, name)) < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} is less than 1")
    return Asked(context, asked.prompt_tokens, asked.max_tokens, _size(asked.image_size))


def _size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT as two numbers."""
    from edgevlm.toolkit.errors import InputError

    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise InputError(f"--image-size {text!r} is no size", hint="such as 640x480")
    return int(width), int(height)


def report(source: str, found: Sequence[Prediction]) -> tuple[dict[str, object], list[str]]:
    """Data and lines of `edgevlm plan`."""
    from edgevlm.engines.sizing import predict
    from edgevlm.toolkit.strict import to_plain

    data = {"kind": "plan", "source": source, "plans": to_plain(list(found))}
    return data, predict.lines(found)
