"""How much memory an engine takes: estimated before it is built, checked before it is opened."""

from __future__ import annotations

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
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.target import CUDA, Target, card, this_cpu
from edgevlm.toolkit.terminal.console import human_bytes
from edgevlm.toolkit.vlm import components, towers
from edgevlm.toolkit.vlm.cost import count, image_axes, state_elements, stored_bytes
from edgevlm.toolkit.vlm.towers import Model

# Weights of a component that a build opens whole, to compare it with the reference; of a larger one
# it holds this much at a time (engines/build/pieces.py). Kernels keep their own copy besides.
WHOLE_BYTES = 2_000_000_000
PIECE_BYTES = 1_000_000_000
_CACHED_BYTES = 24_000_000  # of what an op reads and writes
_ON_CARDS, _MOST_AT_A_TIME = 8, 16  # images
_FUSED = ("causal_mask",)  # the kernels of attention over the cache mask by themselves
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


def element_bytes(target: Target, dtype: str) -> int:
    """Bytes of a float that `target` computes with, in an engine of a bundle of `dtype`."""
    return STORAGE[capabilities.of(target).computes_in(dtype)].itemsize


def estimate(
    bundle: Bundle,
    target: Target,
    context: int,
    plan: PrecisionPlan | None = None,
    prompt_plan: PrecisionPlan | None = None,
) -> Estimate:
    """Memory of an engine at a context length, for one image and a full prompt.

    plan: in place of the bundle's own; prompt_plan: of a second language model. Activations: twice
    the inputs and outputs of the op that has most of them, as the residual stream is alive beside
    it, and the scores of attention over the cache for one chunk of the prompt. Not known here, and
    not in it: what kernels allocate for themselves.
    """
    size = element_bytes(target, bundle.manifest.dtype)
    weights = weights_bytes(bundle.model, plan or bundle.manifest.plan, size)
    if prompt_plan is not None:
        weights += stored_bytes(bundle.model, prompt_plan, size)[bundle.vlm.lm.name]
    return _with_weights(bundle.model, weights, context, size)


def of_engine(engine: Engine, images: int = 1) -> Estimate:
    """The same for an engine on disk; the weights are those of its files.

    images: that a tower by itself sees at a time.
    """
    second = (engine.prompt_form.record,) if engine.prompt_form else ()
    weights = sum(engine.files[c.weights].nbytes for c in (*engine.components, *second))
    size = element_bytes(engine.parsed_target(), engine.dtype)
    return _with_weights(engine.parsed_model(), weights, engine.context, size, images)


def of_model(model: Model, weights: int, context: int, size: int, images: int = 1) -> Estimate:
    """The same for a model of `weights` bytes; size: bytes of a float that it computes with."""
    return _with_weights(model, weights, context, size, images)


def images_at_a_time(engine: Engine) -> int:
    """How many images a tower by itself sees in one call, unless told otherwise.

    On a processor as many as keep the tensors of one op in its caches: CLIP-L/14-336 takes 1.63 s
    an image on one core alone, 1.66 in pairs, 2.03 in sixes. A card has its own, and many cores.
    """
    target = engine.parsed_target()
    return images_together(engine.parsed_model(), target, element_bytes(target, engine.dtype))


def images_together(model: Model, target: Target, size: int) -> int:
    """The same for a tower that is not built; size: bytes of a float that it computes with."""
    if target.on_card:
        return _ON_CARDS
    return max(1, min(_CACHED_BYTES // (size * _largest(model, 0)), _MOST_AT_A_TIME))


def _with_weights(model: Model, weights: int, context: int, size: int, images: int = 1) -> Estimate:
    axes = {"batch": 1, "context": context}
    cache = sum(state_elements(component, axes) for component in components.components(model))
    lm = towers.language_model(model)
    scores = lm.config.num_heads * min(context, PREFILL_CHUNK) * context if lm else 0
    activations = 2 * images * _largest(model, context) + scores
    return Estimate(weights, cache * size, activations * size, context)


def weights_bytes(model: Model, plan: PrecisionPlan, size: int) -> int:
    """Bytes of all weights files; `size`: bytes of a parameter that the plan leaves in float."""
    return sum(stored_bytes(model, plan, size).values())


def _largest(model: Model, context: int) -> int:
    """The most elements that an op reads and writes, for one image with as many views as the
    model allows and a prompt read in chunks. Encoders see one view at a time, the rest all views.
    """
    tiling = model.images.tiling
    points = tiling.pinpoints if tiling else ()
    views = 1 + max((w * h // tiling.tile**2 for w, h in points if tiling), default=0)
    lengths = {"context": context, "sequence": min(context, PREFILL_CHUNK)}
    axes = image_axes(model, views, context) | lengths
    view = axes | {"tiles": 1}
    encoders = components.one_image_each(model)
    return max(
        cost.activation_elements
        for component in components.components(model)
        for cost in count(component, view if component.name in encoders else axes).costs
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
    """Reset `peak_rss_mb` where the system can: several engines are compared in one process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# -- what is free -------------------------------------------------------------------------------


def available_bytes() -> int | None:
    """Memory that this process may still take, None where the system does not report it."""
    limits = [n for n in (_free(), _left_in_container(Path("/sys/fs/cgroup"))) if n is not None]
    return min(limits, default=None)


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
            path = root / folder
            held = int((path / used).read_text()) - _cached(path / "memory.stat")
            return int((path / limit).read_text()) - held
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def _cached(stat: Path) -> int:
    """Bytes of file pages by memory.stat; of the whole subtree, which cgroup v1 calls total_."""
    pairs = dict(line.split() for line in stat.read_text().splitlines())
    kinds = ("active_file", "inactive_file")
    return sum(int(pairs.get(f"total_{kind}", pairs.get(kind, 0))) for kind in kinds)


def require(needed: Estimate, what: str, target: Target | None = None) -> None:
    """Raise OutOfMemory if `what` cannot be held, with the settings that lower the need.

    target: where it is to be held; on a card its memory counts, elsewhere this machine's.
    """
    on_card = target is not None and _has_memory_of_its_own(target)
    free = card.free_bytes() if on_card else available_bytes()
    if free is not None and needed.total_bytes > free:
        raise OutOfMemory(
            f"{what} needs about {human_bytes(needed.total_bytes)} of memory "
            f"({human_bytes(needed.weights_bytes)} weights, {human_bytes(needed.cache_bytes)} KV "
            f"cache of {needed.context} positions), {human_bytes(free)} are free",
            hint="build with --precision int8 or int4, with a smaller --max-context, or with "
            "--max-image-tiles",
        )


def _has_memory_of_its_own(target: Target) -> bool:
    """Whether engines for `target` lie in a card's memory; Jetson's is the processor's."""
    if not target.of_tensorrt:
        return target.backend == CUDA
    from edgevlm.engines.backends.tensorrt import device

    facts = device.facts()
    return facts is not None and not facts.shared


def require_component(bundle: Bundle, plan: PrecisionPlan, target: Target) -> None:
    """The same for a build, which holds one component at a time; on the processor, of a large one
    a piece.
    """
    size = element_bytes(target, bundle.manifest.dtype)
    largest = max(stored_bytes(bundle.model, plan, size).values())
    if target.backend == this_cpu().backend:
        largest = min(largest, WHOLE_BYTES)
    require(Estimate(largest, 0, 0, 0), "building the largest component", target)
