"""What a question makes a model do, call by call, and how long a device takes for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from edgevlm.engines.manifest import PREFILL_CHUNK
from edgevlm.engines.profiling.roofline import Work
from edgevlm.engines.sizing.rates import Machine, product_rate, seconds
from edgevlm.toolkit.ops.costs import Cost
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.toolkit.vlm.cost import count, image_axes, read_bytes, weight_bits

_PRODUCTS = ("linear", "unembed", "conv", "layer_merge")
_ATTENTION = (
    *("attention", "attention_cached", "attention_relative", "attention_rotary"),
    "ms_deform_attn",
)
_FEW_INPUTS = 64  # inputs per output below which a convolution is depthwise


@dataclass(frozen=True)
class Call:
    """One call of a component, `times` over. stage: its name, "prefill" or "decode"."""

    stage: str
    times: int
    costs: tuple[Cost, ...]


def calls(model: ModelConfig, work: Work, answer: int) -> list[Call]:
    """The calls of one question; of decode one, with the mean number of tokens before it.

    An encoder sees one view at a time; a prompt is read in pieces. What makes masks runs once.
    """
    axes = image_axes(model, work.views, work.image_tokens)
    single, behind = components.one_image_each(model), components.after_answer(model)
    found = []
    for component in components.components(model):
        if component.name in single:
            counted = count(component, axes | {"tiles": 1})
            times = 1 if component.name in behind else work.views
            found.append(Call(component.name, times, tuple(counted.costs)))
        elif component.name != model.lm.name:
            found.append(Call(component.name, 1, tuple(count(component, axes).costs)))
    lm = components.lm_component(model.lm)
    for name, length, rows, scored in _steps(work.prompt_tokens, answer):
        lengths = {"sequence": length, "context": rows, "scored": scored}
        found.append(Call(name, 1, tuple(count(lm, axes | lengths).costs)))
    return found


def _steps(prompt: int, answer: int) -> list[tuple[str, int, int, int]]:
    """Stage, tokens, tokens in the cache after it, and scored positions of the decoder's calls."""
    pieces = -(-prompt // PREFILL_CHUNK)
    cuts = [prompt * i // pieces for i in range(pieces + 1)]
    steps = [("prefill", end - begin, end, int(end == prompt)) for begin, end in pairwise(cuts)]
    return [*steps, ("decode", 1, prompt + max(answer // 2, 1), 1)]


@dataclass(frozen=True)
class Time:
    """Seconds of a stage, by what limits its ops: arithmetic, memory, or starting them."""

    arithmetic: float = 0.0
    memory: float = 0.0
    starting: float = 0.0

    def __add__(self, other: Time) -> Time:
        return Time(
            self.arithmetic + other.arithmetic,
            self.memory + other.memory,
            self.starting + other.starting,
        )

    def times(self, factor: int) -> Time:
        """So many of it."""
        return Time(factor * self.arithmetic, factor * self.memory, factor * self.starting)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.arithmetic + self.memory + self.starting

    @property
    def limited_by(self) -> str:
        """What most of the time goes into."""
        shares = {
            "arithmetic": self.arithmetic,
            "memory": self.memory,
            "starting ops": self.starting,
        }
        return max(shares, key=lambda name: shares[name])


def stages(
    found: Sequence[Call], plans: Mapping[str, PrecisionPlan], size: int, machine: Machine
) -> dict[str, Time]:
    """Time of each stage. plans: by stage, "" for all others; size: bytes of a float."""
    times: dict[str, Time] = {}
    for call in found:
        plan = plans.get(call.stage, plans[""])
        one = Time()
        for cost in call.costs:
            one += _time(cost, plan, size, machine)
        times[call.stage] = times.get(call.stage, Time()) + one.times(call.times)
    return times


def _time(cost: Cost, plan: PrecisionPlan, size: int, machine: Machine) -> Time:
    """An op takes as long as the slower of its arithmetic and its traffic, and its start."""
    share, gb_s = machine.efficiency, machine.peaks.gb_s
    precision = _precision(cost, plan)
    moved = seconds(read_bytes(cost, plan, size), share.reading[precision] * gb_s)
    values = cost.kv_elements
    if cost.op not in (*_PRODUCTS, *_ATTENTION):  # of those, values stay in caches
        values += cost.activation_elements
    moved += seconds(values * size, share.activations * gb_s)
    arithmetic = seconds(cost.flops, _rate(cost, precision, machine))
    starting = share.op_us * 1e-6 if cost.flops or cost.weight_elements else 0.0
    if arithmetic >= moved:
        return Time(arithmetic, 0.0, starting)
    return Time(0.0, moved, starting)


def _precision(cost: Cost, plan: PrecisionPlan) -> str:
    """In what the op's matrix is stored; tables are in blocks whatever the linears are in."""
    if not weight_bits(cost, plan):
        return "float"
    return "int8_weights" if cost.op in ("unembed", "embed") else plan.at(cost.path)


def _rate(cost: Cost, precision: str, machine: Machine) -> float:
    """10^9 operations per second of an op."""
    share, peak = machine.efficiency, machine.peaks.gflop_s
    if cost.op == "conv" and cost.matrix_inputs < _FEW_INPUTS:
        return share.depthwise * peak
    if cost.op in _PRODUCTS:
        outputs = cost.matrix_elements // max(cost.matrix_inputs, 1)
        return product_rate(machine, precision, cost.written_elements // max(outputs, 1))
    if cost.op in ("attention_cached", "ms_deform_attn"):
        return (share.cached if cost.op == "attention_cached" else share.sampling) * peak
    return (share.attention if cost.op in _ATTENTION else share.vector) * peak
