"""Which layers static INT8 and FP8 are about, and which of them stay in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from edgevlm.calibration.samples import STATICS, Settings
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.components import MASK_DECODER
from edgevlm.toolkit.vlm.cost import count, image_axes
from edgevlm.toolkit.vlm.towers import Model

MOST_IN_FLOAT = 0.3  # of the layers' arithmetic, to keep within the budget
FLOAT_STEPS = 3  # from none to that many, as each takes a measurement
_HEAD = "lm/head"  # reads one row a token, and its errors reach the logits as they are


@dataclass(frozen=True)
class Layers:
    """The linears and convolutions of a model by path, with their FLOPs for one image and one
    token; those whose weight is not stored as it is used; and the FLOPs of each component.
    """

    flops: Mapping[str, int]
    made: tuple[str, ...]
    totals: Mapping[str, int]


def layers_of(model: Model) -> Layers:
    """Every layer that static INT8 and FP8 are about."""
    axes = image_axes(model, 1, 1) | {"sequence": 1, "context": 1}
    flops, made, totals = dict[str, int](), list[str](), dict[str, int]()
    for part in components.components(model):
        counter = count(part, axes)
        totals[part.name] = counter.flops
        for cost in counter.costs:
            if cost.op in ("linear", "conv") and cost.matrix_elements:
                flops[cost.path] = flops.get(cost.path, 0) + cost.flops
            elif cost.op in ("linear", "conv", "layer_merge"):  # the last has no codes of its own
                made.append(cost.path)
    return Layers(flops, tuple(made), totals)


def plan_of(model: Model, settings: Settings) -> PrecisionPlan:
    """All linears and convolutions in 8 bits, but the output layer and what is to stay in float.

    Raises ConfigError for a glob that no layer matches.
    """
    layers = layers_of(model)
    for glob in settings.keep_float:
        if not any(fnmatchcase(path, glob) for path in layers.flops):
            raise ConfigError(
                f"--keep-float {glob} matches no layer",
                hint=f"paths look like {next(iter(layers.flops))}; the report lists them",
            )
    head = (_HEAD,) if _HEAD in layers.flops else ()
    masks = (f"{MASK_DECODER}/*",) if model.segmenter else ()
    globs = (*head, *masks, *layers.made, *settings.keep_float)
    rules = tuple(Rule(glob, "float") for glob in dict.fromkeys(globs))
    return PrecisionPlan(STATICS[settings.to], rules, method=settings.range)


def without_worst(
    plan: PrecisionPlan, worst: Sequence[str], layers: Layers, step: int
) -> PrecisionPlan:
    """The plan with the first of the layers `worst` in float: as many as do `step` of FLOAT_STEPS
    parts of MOST_IN_FLOAT of the arithmetic.
    """
    most = MOST_IN_FLOAT * step / FLOAT_STEPS * sum(layers.flops[path] for path in worst)
    taken, size = list[str](), 0
    for path in worst:
        if size + layers.flops[path] <= most:
            taken.append(path)
            size += layers.flops[path]
    rules = (*plan.rules, *(Rule(path, "float") for path in taken))
    ranges = {path: largest for path, largest in plan.ranges.items() if path not in taken}
    return replace(plan, rules=rules, ranges=ranges)


def share(name: str, layers: Layers, plan: PrecisionPlan) -> float:
    """Of a component's arithmetic, what its rounded layers do."""
    own = [path for path in layers.flops if path.split("/")[0] == name]
    rounded = sum(layers.flops[path] for path in own if plan.at(path) != "float")
    return rounded / max(layers.totals[name], 1)
