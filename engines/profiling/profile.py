"""Profiling: the time of every stage and layer, beside the roofline's floor."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgevlm.engines import backends, manifest
from edgevlm.engines.backends import Peaks
from edgevlm.engines.backends.state import State
from edgevlm.engines.profiling.roofline import Roofline, Work, roofline
from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.clock import Clock, Span
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.images import decode
from edgevlm.toolkit.images.decode import LoadedImage
from edgevlm.toolkit.target import card, processor_name
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.text.prompts import Prompt

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ProfileRequest:
    """What is measured. image: None for a generated one of 640 x 480."""

    image: Path | None = None
    prompt_tokens: int = 32
    max_tokens: int = 64
    runs: int = 5
    warmup: int = 1
    threads: int = 0
    layers: bool = False

    def check(self) -> None:
        """Raise InputError for a number below the least that can be measured."""
        least = {"runs": 1, "max_tokens": 2, "prompt_tokens": 1, "warmup": 0}
        for name, smallest in least.items():
            if (value := getattr(self, name)) < smallest:
                option = name.replace("_", "-")
                raise InputError(f"--{option} {value} is less than {smallest}")


@dataclass(frozen=True)
class Spread:
    """A stage's durations over the runs, in ms."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float


@dataclass(frozen=True)
class LayerShare:
    """A node's time in one encoder pass, one prefill or all decode steps of a run."""

    component: str
    name: str
    op: str
    ms: float
    calls: int


@dataclass(frozen=True)
class Profile:
    """The result; the keys of `edgevlm profile --json`."""

    engine: str
    stages: dict[str, Spread]
    time_to_first_token_ms: float
    inter_token_latency_ms: float
    output_token_throughput: float
    output_token_throughput_per_user: float
    prefill_tokens_per_s: float
    load_ms: float
    peak_rss_mb: float
    prompt_tokens: int
    image_tokens: int
    generated_tokens: int
    roofline: Roofline
    device: dict[str, str]
    samples: dict[str, list[float]]
    layers: tuple[LayerShare, ...]
    spans: tuple[Span, ...]


def profile_all(
    folders: Sequence[Path], request: ProfileRequest, progress: Progress
) -> list[Profile]:
    """Measure several engines; all are checked before the first is measured."""
    request.check()
    for folder in folders:
        manifest.check(folder, manifest.read(folder))
    return [profile(folder, request, progress) for folder in folders]


def profile(folder: Path, request: ProfileRequest, progress: Progress) -> Profile:
    """Open an engine and measure it: warm-up runs first, then `runs` timed ones."""
    memory.forget_peak()
    with Session.open(folder, threads=request.threads) as session:
        progress(
            f"opened in {session.load_ms:.0f} ms; {request.warmup} warm-up "
            f"and {request.runs} timed runs"
        )
        state = session.new_state()
        for _ in range(request.warmup):
            _run(session, state, request, 0)
        runs = []
        for number in range(request.runs):
            runs.append(_run(session, state, request, number))
            progress(
                f"run {number + 1}: first token {runs[-1].first_ms:.0f} ms, "
                f"then {runs[-1].latency_ms:.2f} ms a token"
            )
        resident = memory.peak_rss_mb()
        peaks = backends.backend(session.engine.parsed_target()).peaks(folder)
    layers = _layers(folder, request) if request.layers else ()
    return _summarise(folder, session, runs, peaks, resident, layers)


@dataclass(frozen=True)
class _Run:
    spans: list[Span]
    decode_ms: list[float]
    first_ms: float
    prompt_tokens: int
    image_tokens: int

    @property
    def latency_ms(self) -> float:
        return float(np.mean(self.decode_ms))


def _run(session: Session, state: State, request: ProfileRequest, number: int) -> _Run:
    """One question with a fixed number of answer tokens: the end-of-answer id does not count."""
    clock = Clock()
    with clock.time("image_decode"):
        image = _image(request, number)
    features = session.encode([image], clock)
    ids = _token_ids(session, request.prompt_tokens)
    sequence = prompts.assemble(Prompt((ids[:1], ids[1:])), features.indices)
    if sequence.length + request.max_tokens > session.engine.context:
        raise InputError(
            f"{sequence.length} prompt tokens and {request.max_tokens} more do not fit into the "
            f"engine's context of {session.engine.context}",
            hint="lower --prompt-tokens or --max-tokens",
        )
    with clock.time("prefill"):
        token = int(session.prefill(sequence, features.rows, state).argmax())
    first, steps = clock.now_ms(), []
    for step in range(request.max_tokens - 1):
        begin = clock.now_ms()
        token = int(session.decode(token, sequence.length + step, state).argmax())
        steps.append(clock.now_ms() - begin)
        clock.spans.append(Span("decode", begin, steps[-1]))
    if session.segmentation is not None:  # one mask, as if the answer had its token
        hidden = session.state_at(session.segmentation.token, sequence.length, state)
        session.masks([hidden], [image], clock)
    return _Run(clock.spans, steps, first, sequence.length, sequence.image_tokens)


def _image(request: ProfileRequest, number: int) -> LoadedImage:
    if request.image is not None:
        return decode.load(request.image)
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (480, 640, 3), np.uint8)
    return LoadedImage(Image.fromarray(pixels))


def _token_ids(session: Session, count: int) -> tuple[int, ...]:
    vocab: int = session.model.lm.config.vocab_size
    return tuple(int(i) for i in np.random.default_rng(0).integers(0, vocab, count))


def _layers(folder: Path, request: ProfileRequest) -> tuple[LayerShare, ...]:
    """The time of every node, from a separate run, because timing nodes slows a run down."""
    with Session.open(folder, threads=request.threads, profile=True) as session:
        _run(session, session.new_state(), request, 0)
        shares = [
            LayerShare(component, layer.name, layer.op, layer.total_ms, layer.calls)
            for component, nodes in session.layers().items()
            for layer in nodes
        ]
    return tuple(sorted(shares, key=lambda layer: -layer.ms))


# -- summary ---------------------------------------------------------------------------------


def _summarise(
    folder: Path,
    session: Session,
    runs: Sequence[_Run],
    peaks: Peaks,
    resident: float,
    layers: tuple[LayerShare, ...],
) -> Profile:
    samples: dict[str, list[float]] = {}
    for run in runs:
        totals: dict[str, float] = {}
        for span in run.spans:
            if span.stage != "decode":
                totals[span.stage] = totals.get(span.stage, 0.0) + span.ms
        for stage, ms in totals.items():
            samples.setdefault(stage, []).append(ms)
    samples["decode"] = [ms for run in runs for ms in run.decode_ms]
    stages = {stage: _spread(values) for stage, values in samples.items()}
    medians = {stage: spread.p50_ms for stage, spread in stages.items()}
    engine = session.engine
    size = memory.element_bytes(engine.parsed_target(), engine.dtype)
    prompts = engine.prompt_form.plan if engine.prompt_form else None
    encoders = [f"encoder.{encoder.name}" for encoder in session.model.encoders]
    views = max(sum(span.stage == name for span in runs[0].spans) for name in encoders)
    work = Work(views, runs[0].image_tokens, runs[0].prompt_tokens)
    first = float(np.median([run.first_ms for run in runs]))
    latency = float(np.median([run.latency_ms for run in runs]))
    generated = len(runs[0].decode_ms) + 1
    return Profile(
        engine=str(folder),
        stages=stages,
        time_to_first_token_ms=round(first, 3),
        inter_token_latency_ms=round(latency, 3),
        output_token_throughput=round(1000 * generated / (first + latency * (generated - 1)), 3),
        output_token_throughput_per_user=round(1000 / latency, 3),
        prefill_tokens_per_s=round(1000 * runs[0].prompt_tokens / medians["prefill"], 1),
        load_ms=round(session.load_ms, 1),
        peak_rss_mb=round(resident, 1),
        prompt_tokens=runs[0].prompt_tokens,
        image_tokens=runs[0].image_tokens,
        generated_tokens=generated,
        roofline=roofline(session.model, engine.plan, peaks, work, medians, size, prompts),
        device=_device(session),
        samples={stage: [round(ms, 3) for ms in values] for stage, values in samples.items()},
        layers=layers,
        spans=tuple(runs[-1].spans),
    )


def _spread(values: Sequence[float]) -> Spread:
    p50, p90, p99 = (round(float(p), 3) for p in np.percentile(values, [50, 90, 99]))
    return Spread(p50, p90, p99, round(float(np.mean(values)), 3))


def _device(session: Session) -> dict[str, str]:
    engine = session.engine
    target, graphics = engine.parsed_target(), card.name()
    return {
        "target": engine.target,
        "processor": processor_name(),
        **({"card": graphics or "?"} if target.arch.startswith("sm_") else {}),
        "threads": str(session.threads),
        "system": f"{platform.system()} {platform.release()}",
        "backend": ".".join(map(str, backends.backend(target).here().version)),
        "precision": engine.precision or engine.dtype,
        "python": platform.python_version(),
    }
