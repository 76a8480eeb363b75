"""Profiling: the time of every stage and layer, beside the roofline's floor."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.engines import backends, manifest
from edgevlm.engines.backends import Peaks
from edgevlm.engines.backends.state import State
from edgevlm.engines.manifest import Engine
from edgevlm.engines.profiling import asked, metrics
from edgevlm.engines.profiling.asked import ProfileRequest as ProfileRequest
from edgevlm.engines.profiling.context import device_part, processor_context
from edgevlm.engines.profiling.drift import Drift, Followed
from edgevlm.engines.profiling.metrics import Distribution
from edgevlm.engines.profiling.residence import MemoryRecorder
from edgevlm.engines.profiling.roofline import Roofline, Work, roofline
from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.clock import Clock, Span
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.target import card, processor_name
from edgevlm.toolkit.vlm import towers

Progress = Callable[[str], None]


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
    """The result; the keys of `edgevlm profile --json`.

    metrics: under AIPerf's names, and the stages'. context: what figures depend on besides.
    memory: (ms, MB) over the whole time, memory_marks: (ms, what began). drift: None without
    another engine.
    """

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
    metrics: Mapping[str, Distribution] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    memory: tuple[tuple[float, float], ...] = ()
    memory_marks: tuple[tuple[float, str], ...] = ()
    size_bytes: int = 0
    drift: Drift | None = None


def profile_all(
    folders: Sequence[Path], request: ProfileRequest, progress: Progress
) -> list[Profile]:
    """Measure several engines; all are checked before the first is measured."""
    request.check()
    for folder in folders:
        engine = manifest.read(folder)
        towers.vlm(engine.parsed_model(), str(folder))
        manifest.check(folder, engine)
    followed = Followed() if len(folders) > 1 else None
    return [profile(folder, request, progress, followed) for folder in folders]


def profile(
    folder: Path, request: ProfileRequest, progress: Progress, followed: Followed | None = None
) -> Profile:
    """Open an engine and measure it: warm-up runs first, then `runs` timed ones.

    followed: what the first of several engines said, with which this one is compared.
    """
    memory.forget_peak()
    context = processor_context()
    with MemoryRecorder() as held, _opened(folder, request, held) as session:
        progress(
            f"opened in {session.load_ms:.0f} ms; {request.warmup} warm-up "
            f"and {request.runs} timed runs"
        )
        state = session.new_state()
        for _ in range(request.warmup):
            held.mark("warm-up")
            _run(session, state, request, 0)
        runs = []
        for number in range(request.runs):
            held.mark(f"run {number + 1}")
            runs.append(_run(session, state, request, number))
            progress(
                f"run {number + 1}: first token {runs[-1].first_ms:.0f} ms, "
                f"then {runs[-1].latency_ms:.2f} ms a token"
            )
        context |= device_part()
        resident = memory.peak_rss_mb()
        drift = None if followed is None else followed.drift(session, request)
        held.mark("limits")
        peaks = backends.backend(session.engine.parsed_target()).peaks(folder)
    layers = _layers(folder, request) if request.layers else ()
    found = _summarise(folder, session, runs, peaks, resident, layers)
    return replace(
        found,
        context=context,
        memory=tuple(held.samples),
        memory_marks=tuple(held.marks),
        drift=drift,
    )


@contextmanager
def _opened(folder: Path, request: ProfileRequest, held: MemoryRecorder) -> Iterator[Session]:
    held.mark("opening")
    with Session.open(folder, threads=request.threads) as session:
        yield session


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
        image = asked.image(request, number)
    features = session.encode([image], clock)
    sequence = asked.sequence(session, request, features.indices)
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
    stages = {stage: spread(values) for stage, values in samples.items()}
    medians = {stage: one.p50_ms for stage, one in stages.items()}
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
        device=device(session.engine, session.threads),
        samples={stage: [round(ms, 3) for ms in values] for stage, values in samples.items()},
        layers=layers,
        spans=tuple(runs[-1].spans),
        metrics=metrics.of_requests([_request(run) for run in runs], samples),
        size_bytes=sum(file.nbytes for file in engine.files.values()),
    )


def _request(run: _Run) -> metrics.Request:
    return metrics.Request(run.first_ms, run.decode_ms, run.prompt_tokens)


def spread(values: Sequence[float]) -> Spread:
    """Percentiles and mean."""
    p50, p90, p99 = (round(float(p), 3) for p in np.percentile(values, [50, 90, 99]))
    return Spread(p50, p90, p99, round(float(np.mean(values)), 3))


def _calibrated(plan: PrecisionPlan) -> str | None:
    """What `calibrate --to` would be for a plan, of an engine that `build` did not quantize."""
    names = {"int4_weights": "int4", "int8": "int8-static"}
    names |= {"int8_weights": "int8", "int8_rows": "int8-rows"}
    return next((told for name, told in names.items() if name in plan.precisions), None)


def device(engine: Engine, threads: int) -> dict[str, str]:
    """What a profile was measured on."""
    target, graphics = engine.parsed_target(), card.name()
    return {
        "target": engine.target,
        "processor": processor_name(),
        **({"card": graphics or "?"} if target.arch.startswith("sm_") else {}),
        "threads": str(threads),
        "system": f"{platform.system()} {platform.release()}",
        "backend": ".".join(map(str, backends.backend(target).here().version)),
        "precision": engine.precision or _calibrated(engine.plan) or engine.dtype,
        "python": platform.python_version(),
    }
