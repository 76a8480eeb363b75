"""Whether a model fits a device, how fast it answers there, and what limits it; without either.

Memory is the estimate that a build and an opened session use (runtime/memory.py). Time adds up what
each op takes at the rates of rates.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from edgevlm.engines.lowering import capabilities
from edgevlm.engines.profiling.roofline import question
from edgevlm.engines.runtime import memory
from edgevlm.engines.sizing import work as working
from edgevlm.engines.sizing.rates import Machine
from edgevlm.engines.sizing.work import Time
from edgevlm.toolkit.errors import InputError, UnsupportedError
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.target import CUDA, DEVICES, has_fp8
from edgevlm.toolkit.vlm.components import after_answer
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.toolkit.vlm.cost import stored_bytes

# TensorRT-RTX stores the float weights of a language model once more for single tokens: measured
# plans are 1.72 times as large (docs/tensorrt.md).
_RTX_TWICE = 1.72
_IN_PLACE = (10, 15)  # TensorRT's first release that updates a KV cache in place; before, two


@dataclass(frozen=True)
class Format:
    """A number format to predict: its name, what floats are stored in, and the plan of weights.

    prompts: of the language model while it reads prompts, where that is a second form.
    """

    name: str
    dtype: str
    plan: PrecisionPlan = PrecisionPlan()
    prompts: PrecisionPlan | None = None


@dataclass(frozen=True)
class Asked:
    """The question: an image of size (width, height), tokens of text, tokens of the answer.

    context: positions of the KV cache.
    """

    context: int
    text: int = 32
    answer: int = 64
    size: tuple[int, int] = (640, 480)


@dataclass(frozen=True)
class Prediction:
    """The result for one device and number format; the keys of `plans[]` in --json.

    fits: whether everything is held at once; largest_context, largest_tiles: the most that fit,
    0 for none, tiles None where images are not cut. stages: ms by name. mask_ms: of one mask behind
    the answer, None where a model makes none. first_token_limited_by: the longest stage, and what
    limits it.
    """

    target: str
    device: str
    precision: str
    fits: bool
    weights_bytes: int
    cache_bytes: int
    activations_bytes: int
    runtime_bytes: int
    total_bytes: int
    memory_bytes: int
    time_to_first_token_ms: float
    inter_token_latency_ms: float
    output_token_throughput_per_user: float
    prefill_tokens_per_s: float
    stages: Mapping[str, float]
    mask_ms: float | None
    first_token_limited_by: str
    token_limited_by: str
    prompt_tokens: int
    image_tokens: int
    context: int
    largest_context: int
    largest_tiles: int | None
    peaks_measured: bool
    notes: tuple[str, ...] = field(default=())


class Planner:
    """Predictions for one model and question; what depends on shapes alone is counted once."""

    def __init__(self, model: ModelConfig, asked: Asked) -> None:
        """Raises InputError where the question is longer than the context."""
        self._model, self._asked = model, asked
        self._work = question(model, asked.size, asked.text)
        self._estimates: dict[tuple[int, int, int | None], memory.Estimate] = {}
        self._check_length()
        self._calls = working.calls(model, self._work, asked.answer)

    def _check_length(self) -> None:
        work, asked = self._work, self._asked
        if work.prompt_tokens + asked.answer > asked.context:
            raise InputError(
                f"{work.prompt_tokens} prompt tokens ({work.image_tokens} of the image) and "
                f"{asked.answer} more do not fit into a context of {asked.context}",
                hint="raise --max-context, or lower --prompt-tokens or --max-tokens",
            )

    def predict(self, given: Format, machine: Machine) -> Prediction:
        """The model in one number format on one device."""
        size = memory.element_bytes(machine.target, given.dtype)
        weights = _weights_bytes(self._model, given, machine, size)
        runtime = machine.efficiency.runtime_bytes
        room = machine.memory_bytes - machine.efficiency.reserved_bytes

        def held(context: int, tiles: int | None = None) -> memory.Estimate:
            found = self._estimate(context, size, tiles)
            copies = 2 if _two_caches(machine) else 1
            cache = copies * found.cache_bytes
            return replace(found, weights_bytes=weights, cache_bytes=cache)

        def fits(context: int, tiles: int | None = None) -> bool:
            return held(context, tiles).total_bytes + runtime <= room

        needed, work = held(self._asked.context), self._work
        times = self.stages(given, machine)
        token, behind = times.pop("decode"), after_answer(self._model)
        masks = [times.pop(name) for name in list(times) if name in behind]
        slowest = max(times, key=lambda name: times[name].seconds)
        first = sum(time.seconds for time in times.values())
        return Prediction(
            target=str(machine.target),
            device=machine.name,
            precision=given.name,
            fits=fits(self._asked.context),
            weights_bytes=weights,
            cache_bytes=needed.cache_bytes,
            activations_bytes=needed.activations_bytes,
            runtime_bytes=runtime,
            total_bytes=needed.total_bytes + runtime,
            memory_bytes=room,
            time_to_first_token_ms=round(1000 * first, 3),
            inter_token_latency_ms=round(1000 * token.seconds, 4),
            output_token_throughput_per_user=round(1 / token.seconds, 2),
            prefill_tokens_per_s=round(work.prompt_tokens / times["prefill"].seconds, 1),
            stages={name: round(1000 * time.seconds, 3) for name, time in times.items()},
            mask_ms=round(1000 * sum(t.seconds for t in masks), 3) if masks else None,
            first_token_limited_by=f"{slowest}: {times[slowest].limited_by}",
            token_limited_by=token.limited_by,
            prompt_tokens=work.prompt_tokens,
            image_tokens=work.image_tokens,
            context=self._asked.context,
            largest_context=self._largest_context(fits),
            largest_tiles=self._largest_tiles(fits),
            peaks_measured=machine.measured,
            notes=notes_of(given, machine),
        )

    def stages(self, given: Format, machine: Machine) -> dict[str, Time]:
        """The time of each stage, and of one token as "decode"."""
        size = memory.element_bytes(machine.target, given.dtype)
        plans = {"": given.plan}
        if given.prompts is not None:
            plans["prefill"] = given.prompts
        return working.stages(self._calls, plans, size, machine)

    def _estimate(self, context: int, size: int, tiles: int | None) -> memory.Estimate:
        """Memory besides the weights, for images of at most `tiles` tiles."""
        key = (context, size, tiles)
        if key not in self._estimates:
            model = self._model if tiles is None else _limited(self._model, tiles)
            self._estimates[key] = memory.of_model(model, 0, context, size)
        return self._estimates[key]

    def _largest_context(self, fits: Callable[[int], bool]) -> int:
        """The most positions that fit, up to the model's own, in steps of 256."""
        step, most = 256, int(self._model.lm.config.context)
        if fits(most):
            return most
        low, high = 0, most // step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * step) else (low, middle)
        return low * step

    def _largest_tiles(self, fits: Callable[[int, int], bool]) -> int | None:
        """The most tiles of an image whose tokens fit the context and whose values fit the memory;
        None where images are not cut.
        """
        tiling = self._model.images.tiling
        if tiling is None:
            return None
        context = self._asked.context
        counts = {w * h // tiling.tile**2 for w, h in tiling.pinpoints}
        for tiles in sorted(counts, reverse=True):
            longest = _longest(_limited(self._model, tiles)) + self._asked.text
            if longest <= context and fits(context, tiles):
                return tiles
        return 0


def _limited(model: ModelConfig, tiles: int) -> ModelConfig:
    """The model with images of at most so many tiles."""
    tiling = model.images.tiling
    assert tiling is not None
    return replace(model, images=replace(model.images, tiling=tiling.limited(tiles)))


def _longest(model: ModelConfig) -> int:
    """The most tokens of an image in any of the model's resolutions."""
    tiling = model.images.tiling
    assert tiling is not None
    return max(question(model, size, 0).prompt_tokens for size in tiling.pinpoints)


def _two_caches(machine: Machine) -> bool:
    target = machine.target
    return target.backend == "tensorrt" and () < target.version < _IN_PLACE


def _weights_bytes(model: ModelConfig, given: Format, machine: Machine, size: int) -> int:
    sizes = stored_bytes(model, given.plan, size)
    lm = sizes.pop(model.lm.name)
    if given.prompts is not None:
        lm += stored_bytes(model, given.prompts, size)[model.lm.name]
    elif machine.target.backend == "tensorrt-rtx" and not given.plan.precisions:
        lm = round(_RTX_TWICE * lm)
    return sum(sizes.values()) + lm


def notes_of(given: Format, machine: Machine, *, caches: bool = True) -> tuple[str, ...]:
    """What a prediction rests on. caches: whether the model has a KV cache."""
    notes = []
    if not machine.measured:
        notes.append("peaks are the vendor's, the shares of them that kernels reach are assumed")
    computed = capabilities.of(machine.target).computes_in(given.dtype)
    if computed != given.dtype:
        notes.append(f"{given.dtype} is computed in {computed} there")
    lacking = _lacking(given, machine)
    if lacking:
        notes.append(f"{lacking}, builds for it refuse")
    elif "fp8" in given.plan.precisions and not machine.peaks.fp8_gflop_s:
        notes.append("it multiplies FP8 as floats")
    if given.prompts is not None:
        notes.append("the language model has a second form for prompts")
    if caches and _two_caches(machine):
        notes.append("this TensorRT keeps the KV cache twice")
    return tuple(notes)


def refuse_lacking(given: Format, machine: Machine) -> None:
    """Raise UnsupportedError for a number format of products that a card has not."""
    lacking = _lacking(given, machine)
    if lacking:
        with_it = [name for name, device in DEVICES.items() if "fp8" in device.peak_tops]
        raise UnsupportedError(
            f"{machine.name}: {lacking}",
            hint="take int8-static, or one of those that have FP8: " + ", ".join(with_it)
            if machine.target.of_tensorrt
            else "TensorRT does: name the device, such as rtx-4090 or h100",
        )


def _lacking(given: Format, machine: Machine) -> str:
    """Why no engine of a format can be built for a card; "" where one can."""
    target, precisions = machine.target, given.plan.precisions
    if target.of_tensorrt and "fp8" in precisions and not has_fp8(target.arch):
        without = [arch for arch in target.arch.split("+") if not has_fp8(arch)]
        return f"{', '.join(without)} has no FP8"
    if target.backend == CUDA and {"fp8", "int8"} & precisions:
        return "ONNX Runtime multiplies no inputs in 8 bits on a card"
    return ""


# -- for people ----------------------------------------------------------------------------------


def report(source: str, found: Sequence[Prediction]) -> tuple[dict[str, object], list[str]]:
    """Data and lines of `edgevlm plan`."""
    from edgevlm.toolkit.strict import to_plain

    return {"kind": "plan", "source": source, "plans": to_plain(list(found))}, lines(found)


def lines(found: Sequence[Prediction]) -> list[str]:
    """A table of predictions, and what it rests on."""
    from edgevlm.toolkit.terminal.console import human_bytes, table

    rows = [
        (
            p.device,
            p.precision,
            human_bytes(p.total_bytes),
            "yes" if p.fits else "NO",
            p.time_to_first_token_ms,
            p.inter_token_latency_ms,
            p.output_token_throughput_per_user,
            p.first_token_limited_by,
            p.token_limited_by,
            p.largest_context,
            "-" if p.largest_tiles is None else str(p.largest_tiles),
        )
        for p in found
    ]
    columns = (
        *("device", "precision", "memory", "fits", "first token ms", "ms a token", "tokens/s"),
        *("first token limited by", "token by", "largest context", "tiles"),
    )
    p = found[0]
    text = [
        f"{p.prompt_tokens} prompt tokens, {p.image_tokens} of them image; "
        f"a context of {p.context}",
        *table(columns, rows),
    ]
    if len(found) == 1:
        text += ["", *_detail(p)]
    return [*text, *told((p.device, p.notes) for p in found)]


def told(notes_of_devices: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """A line for each note with its devices, behind an empty one."""
    notes: dict[str, list[str]] = {}
    for device, own in notes_of_devices:
        for note in own:
            notes.setdefault(note, []).append(device)
    found = [f"note: {note}: {', '.join(dict.fromkeys(n))}" for note, n in notes.items()]
    return ["", *found] if found else []


def _detail(p: Prediction) -> list[str]:
    from edgevlm.toolkit.terminal.console import human_bytes, table

    parts = {
        "weights": p.weights_bytes,
        "KV cache": p.cache_bytes,
        "activations": p.activations_bytes,
        "runtime": p.runtime_bytes,
    }
    behind = [] if p.mask_ms is None else [("a mask, behind the answer", p.mask_ms)]
    stages = table(("stage", "ms"), [*p.stages.items(), *behind])
    held = ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items())
    return [*stages, f"memory: {held}, of {human_bytes(p.memory_bytes)}"]
