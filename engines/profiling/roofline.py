"""The time that a machine cannot go below: each stage's arithmetic and memory traffic at peak.

(Williams et al., "Roofline", CACM 2009.) Weights are read once a call; activations are taken to
stay in the caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from edgevlm.engines import backends
from edgevlm.engines.backends import Peaks
from edgevlm.toolkit.images.tiling import arrange, best_resolution
from edgevlm.toolkit.ops.wrappers import Cost, Count
from edgevlm.toolkit.quantization.plan import WEIGHT_BITS, PrecisionPlan
from edgevlm.toolkit.target import Target
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.toolkit.vlm.cost import count, image_axes, outputs

_PRODUCTS = ("linear", "unembed")


@dataclass(frozen=True)
class Work:
    """One question: views of its image, the image's tokens, positions of the whole prompt."""

    views: int
    image_tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class Bound:
    """A stage beside its floor: the larger of its arithmetic and its memory traffic at peak."""

    stage: str
    gflops: float
    gbytes: float
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


def roofline(
    model: ModelConfig,
    plan: PrecisionPlan,
    peaks: Peaks,
    work: Work,
    measured_ms: Mapping[str, float],
) -> Roofline:
    """Every stage's floor, and how near its measured median came (0 where there is none)."""
    bounds = [
        _bound(stage, calls, counter, plan, peaks, measured_ms.get(stage, 0.0))
        for stage, calls, counter in _stages(model, work)
    ]
    return Roofline(peaks.gflop_s, peaks.int8_gop_s, peaks.gb_s, tuple(bounds))


@dataclass(frozen=True)
class Floors:
    """What a machine allows at best: one image of 640 x 480 and 32 tokens of text."""

    time_to_first_token_ms: float
    inter_token_latency_ms: float
    prompt_tokens: int
    image_tokens: int
    peak_gflop_s: float
    peak_int8_gop_s: float
    peak_gb_s: float


def floors(model: ModelConfig, plan: PrecisionPlan, target: Target) -> Floors:
    """The floors of an engine that has not been built, from peaks measured now."""
    backend = backends.backend(target)
    with TemporaryDirectory() as folder:
        backend.extras(Path(folder))
        peaks = backend.peaks(Path(folder))
    work = question(model)
    stages = {
        bound.stage: bound.floor_ms for bound in roofline(model, plan, peaks, work, {}).stages
    }
    token = stages.pop("decode")
    first = round(sum(stages.values()), 3)
    return Floors(first, token, work.prompt_tokens, work.image_tokens, *astuple(peaks))


def question(model: ModelConfig, size: tuple[int, int] = (640, 480), text: int = 32) -> Work:
    """The work of one image of `size` (width, height) and so many tokens of text."""
    rules = model.images
    grid = None
    if rules.tiling is not None:
        wide, tall = best_resolution(size, rules.tiling.pinpoints)
        grid = (wide // rules.tiling.tile, tall // rules.tiling.tile)
    views = 1 + grid[0] * grid[1] if grid else 1
    if rules.arrangement is not None:
        tokens = len(arrange(rules.arrangement, views, grid, size).rows)
    else:
        merger = next(part for part in components.components(model) if part.name == "merger")
        tokens = outputs(merger, image_axes(model, views, 1))["features"].shape[0]
    return Work(views, tokens, tokens + text)


def _stages(model: ModelConfig, work: Work) -> list[tuple[str, int, Count]]:
    """Name, calls and cost of a call. An encoder sees one view at a time."""
    axes = image_axes(model, work.views, work.image_tokens) | {"context": work.prompt_tokens}
    encoders = {f"encoder.{part.name}" for part in model.encoders}
    found = []
    for part in components.components(model):
        if part.name in encoders:
            found.append((part.name, work.views, count(part, axes | {"tiles": 1})))
        elif part.name == model.lm.name:
            for stage, length in (("prefill", work.prompt_tokens), ("decode", 1)):
                found.append((stage, 1, count(part, axes | {"sequence": length})))
        else:
            found.append((part.name, 1, count(part, axes)))
    return found


def _bound(
    stage: str, calls: int, counter: Count, plan: PrecisionPlan, peaks: Peaks, measured_ms: float
) -> Bound:
    nbytes = calls * sum(c.weight_elements * plan.weight_bytes(c.path, 4) for c in counter.costs)
    narrow = calls * sum(c.flops for c in counter.costs if _rounds(c, plan))
    flops = calls * counter.flops
    arithmetic = ((flops - narrow) / peaks.gflop_s + narrow / peaks.int8_gop_s) / 1e6
    traffic = nbytes / peaks.gb_s / 1e6
    floor = max(arithmetic, traffic)
    return Bound(
        stage,
        round(flops / 1e9, 3),
        round(nbytes / 1e9, 3),
        round(floor, 3),
        "arithmetic" if arithmetic >= traffic else "memory",
        round(floor / measured_ms, 3) if measured_ms else 0.0,
    )


def _rounds(cost: Cost, plan: PrecisionPlan) -> bool:
    """Whether an op multiplies in 8 bits."""
    return cost.op in _PRODUCTS and plan.at(cost.path) in WEIGHT_BITS
