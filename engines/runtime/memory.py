"""How much memory an engine takes: estimated before it is built, checked before it is opened."""

from __future__ import annotations

import math
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgevlm.engines.lowering import capabilities
from edgevlm.engines.manifest import PREFILL_CHUNK, Engine
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.safetensors_io import STORAGE
from edgevlm.toolkit.errors import OutOfMemory
from edgevlm.toolkit.quantization.plan import WEIGHT_BITS, PrecisionPlan
from edgevlm.toolkit.target import Target
from edgevlm.toolkit.terminal.console import human_bytes
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.toolkit.vlm.cost import count, image_axes

_FUSED = ("causal_mask", "attention_cached")
# A container's limit and use: cgroup v2, then v1.
_CGROUPS = (
    (".", "memory.max", "memory.current"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Estimate:
    """Bytes by use. weights: as the target holds them; cache: the KV cache at full context."""

    weights_bytes: int
    cache_bytes: int
    activations_bytes: int
    context: int

    @property
    def total_bytes(self) -> int:
        """Everything that is held at once."""
        return self.weights_bytes + self.cache_bytes + self.activations_bytes


def estimate(
    bundle: Bundle, target: Target, context: int, plan: PrecisionPlan | None = None
) -> Estimate:
    """Memory of an engine at a context length, for one image and a full prompt.

    plan: in place of the bundle's own. Activations: twice the inputs and outputs of the op that
    has most of them, which leaves room for the residual stream, and the scores of attention over
    the cache for one piece of the prompt. Not known here, and not in it: what kernels allocate
    for themselves.
    """
    size = STORAGE[capabilities.of(target).computes_in(bundle.manifest.dtype)].itemsize
    weights = weights_bytes(bundle.model, plan or bundle.manifest.plan, size)
    return _with_weights(bundle.model, weights, context, size)


def of_engine(made: Engine) -> Estimate:
    """The same for an engine that stands on disk; the weights are those of its files."""
    weights = sum(made.files[c.weights].nbytes for c in made.components)
    return _with_weights(made.parsed_model(), weights, made.context, 4)


def _with_weights(model: ModelConfig, weights: int, context: int, size: int) -> Estimate:
    lm, piece = model.lm.config, min(context, PREFILL_CHUNK)
    cache = 2 * lm.num_layers * lm.num_kv_heads * lm.head_dim * context * size
    scores = lm.num_heads * piece * context
    return Estimate(weights, cache, (2 * _largest(model, context) + scores) * size, context)


def weights_bytes(model: ModelConfig, plan: PrecisionPlan, wide: int) -> int:
    """Bytes of all weights; `wide`: of one that the plan leaves in float."""
    total = 0.0
    for part in components.components(model):
        few = {
            c.path: c.weight_elements
            for c in count(part, _axes(model, 1)).costs
            if c.op == "linear" and plan.at(c.path) in WEIGHT_BITS
        }
        if plan.at(f"{part.name}/embed") in WEIGHT_BITS and "embed.weight" in part.shapes:
            few[f"{part.name}/embed"] = math.prod(part.shapes["embed.weight"])
        every = sum(math.prod(shape) for shape in part.shapes.values())
        total += (every - sum(few.values())) * wide
        total += sum(n * plan.weight_bytes(site, wide) for site, n in few.items())
    return round(total)


def _axes(model: ModelConfig, context: int) -> dict[str, int]:
    """One question with the most views that a image can have, read in pieces."""
    tiling = model.images.tiling
    points = tiling.pinpoints if tiling else ()
    views = 1 + max((w * h // tiling.tile**2 for w, h in points if tiling), default=0)
    lengths = {"context": context, "sequence": min(context, PREFILL_CHUNK)}
    return image_axes(model, views, context) | lengths


def _largest(model: ModelConfig, context: int) -> int:
    """Elements that an op reads and writes at most. Encoders see one view, the rest all views."""
    axes = _axes(model, context)
    encoders = {f"encoder.{part.name}" for part in model.encoders}
    return max(
        cost.activation_elements
        for part in components.components(model)
        for cost in count(part, axes | {"tiles": 1} if part.name in encoders else axes).costs
        if cost.op not in _FUSED
    )


# -- what is held --------------------------------------------------------------------------


def peak_rss_mb() -> float:
    """The most memory that this process has held since it began or `forget_peak`, in MB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(s.split()[1]) for s in lines if s.startswith("VmHWM")) / 1024
    except (OSError, StopIteration, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1e6 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Let `peak_rss_mb` begin anew, where the system can: engines are compared in one process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# -- what there is -----------------------------------------------------------------------------


def available_bytes() -> int | None:
    """Memory that this process may still take, None where the system does not tell."""
    found = [n for n in (_free(), _left_in_container(Path("/sys/fs/cgroup"))) if n is not None]
    return min(found, default=None)


def _free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(s.split()[1]) for s in lines if s.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _left_in_container(root: Path) -> int | None:
    """What a cgroup may still take; cached file pages are given back when memory is short."""
    for folder, limit, used in _CGROUPS:
        try:
            place = root / folder
            held = int((place / used).read_text()) - _cached(place / "memory.stat")
            return int((place / limit).read_text()) - held
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def _cached(stat: Path) -> int:
    """Bytes of file pages by memory.stat; of the whole subtree, which cgroup v1 calls total_."""
    pairs = dict(line.split() for line in stat.read_text().splitlines())
    kinds = ("active_file", "inactive_file")
    return sum(int(pairs.get(f"total_{kind}", pairs.get(kind, 0))) for kind in kinds)


def require(needed: Estimate, what: str) -> None:
    """Raise OutOfMemory if `what` cannot be held, with the settings that lower the need."""
    had = available_bytes()
    if had is not None and needed.total_bytes > had:
        raise OutOfMemory(
            f"{what} needs about {human_bytes(needed.total_bytes)} of memory "
            f"({human_bytes(needed.weights_bytes)} weights, {human_bytes(needed.cache_bytes)} KV "
            f"cache of {needed.context} positions), {human_bytes(had)} are free",
            hint="build with --precision int8 or int4, with a smaller --max-context, or with "
            "--max-image-tiles",
        )


def require_component(bundle: Bundle, plan: PrecisionPlan, target: Target) -> None:
    """The same for a build, which holds one component at a time."""
    size = STORAGE[capabilities.of(target).computes_in(bundle.manifest.dtype)].itemsize
    shares = [c.params for c in bundle.manifest.components]
    largest = round(weights_bytes(bundle.model, plan, size) * max(shares) / max(sum(shares), 1))
    require(Estimate(largest, 0, 0, 0), "building the largest component")
