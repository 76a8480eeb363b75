"""Plans that need no samples: weights alone in fewer bits, rounded to nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.quantization.blockwise import StorageFormat
from edgevlm.toolkit.quantization.plan import Precision, PrecisionPlan, Rule
from edgevlm.toolkit.strict import from_plain, read_json
from edgevlm.toolkit.vlm import towers
from edgevlm.toolkit.vlm.components import components
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.toolkit.vlm.cost import count, image_axes, weight_bits
from edgevlm.toolkit.vlm.towers import Model

KINDS = ("int8", "int4")
_FLOATS = ("fp32", "fp16", "bf16")  # a bundle's formats, which people ask `build` for
ROWS = "int8-rows"  # inputs in 8 bits too, without samples: one step per row, found when it runs
BLOCKS: Mapping[str, str] = {"int8-blocks": "int8", "int4-blocks": "int4"}  # weights alone


def chosen(model: Model, forms: Mapping[str, Precision]) -> PrecisionPlan:
    """The linears of each component in the precision that `forms` has for it; of a language model
    see `of_lm`.
    """
    lm = towers.language_model(model)
    name_of_lm = lm.name if lm else None
    rules = [Rule(f"{name}/*", form) for name, form in forms.items() if name != name_of_lm]
    rules += of_lm(lm.name, forms[lm.name]).rules if lm else ()
    return PrecisionPlan("int8_weights", tuple(rules), method="round to nearest")


def of_lm(lm: str, form: Precision) -> PrecisionPlan:
    """The language model's layers in one precision; its embedding table and output layer in 8 bits,
    or in float as the layers are.
    """
    if form == "float":
        return PrecisionPlan("int8_weights", (Rule(f"{lm}/*", "float"),), method="none")
    rules = (Rule(f"{lm}/layers.*", form),)
    return PrecisionPlan("int8_weights", rules, method="round to nearest")


def with_vision(lm_plan: PrecisionPlan, model: ModelConfig) -> PrecisionPlan:
    """A plan of the language model, and the linears before it in 8 bits with their inputs by rows:
    faster than in blocks on every processor measured, and as exact.
    """
    names = [component.name for component in components(model) if component.name != model.lm.name]
    rules = tuple(Rule(f"{name}/*", "int8_rows") for name in names)
    return replace(lm_plan, rules=(*rules, *lm_plan.rules))


def keeping(plan: PrecisionPlan, model: Model, globs: Sequence[str]) -> PrecisionPlan:
    """The plan with the layers that any of `globs` matches in float.

    Raises ConfigError for a glob that matches no layer that the plan rounds.
    """
    axes = image_axes(model, 1, 1) | {"sequence": 1, "context": 1}
    costs = [cost for part in components(model) for cost in count(part, axes).costs]
    paths = [cost.path for cost in costs if weight_bits(cost, plan)]
    for glob in globs:
        if not any(fnmatchcase(path, glob) for path in paths):
            shown = f"such as {paths[0]}" if paths else "none"
            raise ConfigError(
                f"--keep-float {glob} matches no layer that would be rounded",
                hint=f"those are paths {shown}; globs may have * in them: 'lm/*/mlp/down'",
            )
    return replace(plan, rules=(*plan.rules, *(Rule(glob, "float") for glob in globs)))


def refuse_keeping(globs: Sequence[str]) -> None:
    """Raise ConfigError for layers that are to stay in float where no weight is rounded."""
    if globs:
        raise ConfigError(
            f"--keep-float {globs[0]} has no effect: no weight is rounded",
            hint="leave it out, or add --precision",
        )


def check_known(kind: str, others: Sequence[str]) -> None:
    """Raise ConfigError unless `plan` knows this name; others: what else its user may say."""
    known = (*KINDS, ROWS, *BLOCKS)
    if kind not in known:
        hint = f"known: {', '.join((*others, *known))}"
        raise ConfigError(f"--precision {kind!r} is unknown", hint=hint)


def plan(kind: str, option: str = "--precision") -> PrecisionPlan:
    """int8: every linear and the embedding table. int4: the language model's layers in 4 bits.

    Encoders, merger, embedding table and output layer stay at 8 bits there: they are a small part
    of the bytes that a token reads, and lose more by rounding. int8-rows: every linear with its
    input (toolkit/quantization/channels.py), the embedding table as in int8. Raises ConfigError
    for other names, which `option` stated.
    """
    kind = BLOCKS.get(kind, kind)
    if kind == ROWS:
        return PrecisionPlan("int8_rows", method="round to nearest")
    if kind not in KINDS:
        known = ", ".join((*KINDS, ROWS, *BLOCKS) if option == "--precision" else KINDS)
        stored = (
            "; of floats the format is chosen at export: --dtype fp16" if kind in _FLOATS else ""
        )
        raise ConfigError(f"{option} {kind!r} is unknown", hint=f"known: {known}{stored}")
    rules = (Rule("lm/layers.*", "int4_weights"),) if kind == "int4" else ()
    return PrecisionPlan("int8_weights", rules, method="round to nearest")


def plan_for(kind: str, model: Model) -> PrecisionPlan:
    """The plan that `--precision` names. Raises ConfigError for 4 bits of a tower by itself."""
    found = plan(kind)
    if towers.language_model(model) is None and "4" in kind:
        raise ConfigError(
            f"--precision {kind} is for the layers of a language model; {model.name} is a vision "
            "tower by itself",
            hint="take --precision int8",
        )
    return found


def plan_of(given: str, option: str) -> PrecisionPlan:
    """The plan that `given` names: int8 or int4, or else the JSON file of one.

    Raises ConfigError for other names, which `option` stated, and for a damaged file.
    """
    if given in KINDS or not Path(given).exists():
        return plan(given, option)
    return from_plain(PrecisionPlan, read_json(Path(given)), given)


def fitting(storage: StorageFormat, inputs: int) -> StorageFormat:
    """The storage for a weight of so many inputs: without zero points if they cannot be packed."""
    return storage if storage.block_in(inputs) else replace(storage, zero_points=False)


def up_to(worst: Sequence[str], sizes: Mapping[str, int], most: float) -> tuple[str, ...]:
    """The first of the weights `worst` that have at most so many elements together."""
    taken, size = list[str](), 0
    for key in worst:
        if size + sizes[key] > most:
            continue
        taken.append(key)
        size += sizes[key]
    return tuple(taken)
