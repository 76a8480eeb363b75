"""The time that a machine cannot go below: each stage's arithmetic and memory traffic at peak.

(Williams et al., "Roofline", CACM 2009.) A stage is one call of its component, an encoder's one
call per view. Its traffic: every weight once, the rows of the KV cache that it reads, up to the
length reached, and the rows that it writes. Activations are taken to stay in the caches and are
not counted. Where they do not (an encoder of large images: its MLP alone moves tens of
megabytes per layer), the floor is lower than any kernel can reach. So it is for a prompt that is
read in several chunks, each of which reads the weights and the cache again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from edgevlm.engines import backends
from edgevlm.engines.backends import Peaks
from edgevlm.engines.lowering import capabilities
from edgevlm.engines.runtime.memory import element_bytes
from edgevlm.toolkit.images.tiling import arrange, best_resolution
from edgevlm.toolkit.ops.wrappers import Count
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.target import CUDA, DEVICES, Target
from edgevlm.toolkit.vlm import components, towers
from edgevlm.toolkit.vlm.cost import count, image_axes, outputs, read_bytes, weight_bits
from edgevlm.toolkit.vlm.towers import Model, TowerConfig

_PRODUCTS = ("linear", "unembed")  # with weights in 8 or 4 bits they multiply in 8 bits


@dataclass(frozen=True)
class Work:
    """One question: views of its image, the image's tokens, positions of the whole prompt."""

    views: int
    image_tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class Bound:
    """A stage beside its floor: the larger of its arithmetic and its memory traffic at peak.

    gflops: 10^9 FLOPs; gbytes: 10^9 bytes of weights and KV cache; kv_gbytes: those of the KV
    cache; limited_by: "arithmetic" or "memory"; reached: floor_ms / measured ms, 0 if not measured.
    """

    stage: str
    gflops: float
    gbytes: float
    kv_gbytes: float
    floor_ms: float
    limited_by: str
    reached: float


@dataclass(frozen=True)
class Roofline:
    """Peaks of this machine, measured with the backend's own kernels, and what they allow."""

    peak_gflop_s: float
    peak_int8_gop_s: float
    peak_gb_s: float
    stages: tuple[Bound, ...]
    peak_fp8_gflop_s: float = 0.0


def roofline(
    model: Model,
    plan: PrecisionPlan,
    peaks: Peaks,
    work: Work,
    measured_ms: Mapping[str, float],
    size: int,
    prompt_plan: PrecisionPlan | None = None,
) -> Roofline:
    """Every stage's floor, and how near its measured median came (0 where there is none).

    prompt_plan: where prompts are read in another precision than `plan` says. size: bytes of a
    weight that the plan leaves in float, and of an element of the KV cache.
    """
    plans = {"prefill": prompt_plan or plan}
    bounds = [
        _bound(_traffic(stage, calls, counter, plans.get(stage, plan), size), peaks, measured_ms)
        for stage, calls, counter in _stages(model, work)
    ]
    rates = peaks.gflop_s, peaks.int8_gop_s, peaks.gb_s
    return Roofline(*rates, tuple(bounds), peaks.fp8_gflop_s)


@dataclass(frozen=True)
class Floors:
    """What a machine allows at best: one image of 640 x 480 and 32 tokens of text.

    A vision tower by itself has no prompt and no tokens: the first time is that of an image.
    """

    time_to_first_token_ms: float
    inter_token_latency_ms: float
    prompt_tokens: int
    image_tokens: int
    peak_gflop_s: float
    peak_int8_gop_s: float
    peak_gb_s: float
    peak_fp8_gflop_s: float = 0.0


def floors(model: Model, plan: PrecisionPlan, target: Target, dtype: str) -> Floors:
    """The floors of an engine that is not built yet, from peaks measured now.

    dtype: of the bundle.
    """
    backend = backends.backend(target)
    with TemporaryDirectory() as folder:
        backend.extras(Path(folder))
        peaks = backend.peaks(Path(folder))
    return _floors(model, plan, target, dtype, peaks)


def floors_of_devices(
    model: Model, plan: PrecisionPlan, target: Target, dtype: str
) -> dict[str, Floors]:
    """The same for every known device of a target, from its vendor's figures, by name.

    Weights in codes become floats before they are multiplied there, but with static INT8 and FP8.
    """
    found = {}
    computed = capabilities.of(target).computes_in(dtype)
    for name, device in DEVICES.items():
        known = target.backend in (device.target.backend, CUDA)
        if known and target.holds(device.target.arch):
            tops = {kind: 1000 * rate for kind, rate in device.peak_tops.items()}
            rate = tops["fp16"] / (2 if computed == "fp32" else 1)
            int8 = tops["int8"] if "int8" in plan.precisions else rate
            peaks = Peaks(rate, int8, device.bandwidth_gb_s, tops.get("fp8", 0.0))
            found[name] = _floors(model, plan, target, dtype, peaks)
    return found


def _floors(model: Model, plan: PrecisionPlan, target: Target, dtype: str, peaks: Peaks) -> Floors:
    work = question(model)
    bounds = roofline(model, plan, peaks, work, {}, element_bytes(target, dtype)).stages
    stages = {bound.stage: bound.floor_ms for bound in bounds}
    token = stages.pop("decode", 0.0)
    for behind in components.after_answer(model):
        stages.pop(behind)
    first = round(sum(stages.values()), 3)
    return Floors(first, token, work.prompt_tokens, work.image_tokens, *astuple(peaks))


def question(model: Model, size: tuple[int, int] = (640, 480), text: int = 32) -> Work:
    """The work of one image of `size` (width, height) and so many tokens of text."""
    if isinstance(model, TowerConfig):
        return Work(1, 0, 0)
    rules = model.images
    grid = None
    if rules.tiling is not None:
        width, height = best_resolution(size, rules.tiling.pinpoints)
        grid = (width // rules.tiling.tile, height // rules.tiling.tile)
    views = 1 + grid[0] * grid[1] if grid else 1
    if rules.arrangement is not None:
        tokens = len(arrange(rules.arrangement, views, grid, size).rows)
    else:
        merger = next(c for c in components.components(model) if c.name == "merger")
        tokens = outputs(merger, image_axes(model, views, 1))["features"].shape[0]
    return Work(views, tokens, tokens + text)


def _stages(model: Model, work: Work) -> list[tuple[str, int, Count]]:
    """Name, calls and cost of a call. An encoder sees one view at a time; decode is the first
    step after the prompt, whose token attends to the prompt and to itself.
    """
    axes = image_axes(model, work.views, work.image_tokens)
    single, behind = components.one_image_each(model), components.after_answer(model)
    lm = towers.language_model(model)
    stages = []
    for component in components.components(model):
        if component.name in single:
            calls = 1 if component.name in behind else work.views
            stages.append((component.name, calls, count(component, axes | {"tiles": 1})))
        elif lm is not None and component.name == lm.name:
            for stage, length, rows in (
                ("prefill", work.prompt_tokens, work.prompt_tokens),
                ("decode", 1, work.prompt_tokens + 1),
            ):
                lengths = {"sequence": length, "context": rows}
                stages.append((stage, 1, count(component, axes | lengths)))
        else:
            stages.append((component.name, 1, count(component, axes)))
    return stages


@dataclass(frozen=True)
class _Traffic:
    """What a stage computes and moves: FLOPs in float, in 8 bits and in FP8, bytes by use."""

    stage: str
    flops: int
    int8_ops: int
    fp8_ops: int
    weights_bytes: float
    kv_bytes: int


def _traffic(stage: str, calls: int, counter: Count, plan: PrecisionPlan, size: int) -> _Traffic:
    costs = counter.costs
    coded = [c for c in costs if c.op in _PRODUCTS and weight_bits(c, plan)]
    fp8_ops = sum(c.flops for c in coded if plan.at(c.path) == "fp8")
    int8_ops = sum(c.flops for c in coded) - fp8_ops
    return _Traffic(
        stage,
        calls * (counter.flops - int8_ops - fp8_ops),
        calls * int8_ops,
        calls * fp8_ops,
        calls * sum(read_bytes(c, plan, size) for c in costs),
        calls * sum(c.kv_elements for c in costs) * size,
    )


def _bound(work: _Traffic, peaks: Peaks, measured_ms: Mapping[str, float]) -> Bound:
    nbytes = work.weights_bytes + work.kv_bytes
    in_float = work.flops / peaks.gflop_s + work.fp8_ops / (peaks.fp8_gflop_s or peaks.gflop_s)
    arithmetic = (in_float + work.int8_ops / peaks.int8_gop_s) / 1e6
    memory = nbytes / peaks.gb_s / 1e6
    floor, measured = max(arithmetic, memory), measured_ms.get(work.stage, 0.0)
    return Bound(
        work.stage,
        round((work.flops + work.int8_ops + work.fp8_ops) / 1e9, 3),
        round(nbytes / 1e9, 3),
        round(work.kv_bytes / 1e9, 3),
        round(floor, 3),
        "arithmetic" if arithmetic >= memory else "memory",
        round(floor / measured, 3) if measured else 0.0,
    )
