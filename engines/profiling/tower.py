"""Profiling an engine of a vision tower by itself: the time of one image, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.engines import backends, manifest
from edgevlm.engines.backends import Peaks
from edgevlm.engines.profiling.asked import ProfileRequest, image
from edgevlm.engines.profiling.context import device_part, processor_context
from edgevlm.engines.profiling.metrics import Distribution, distribution
from edgevlm.engines.profiling.profile import LayerShare, Progress, Spread, device, spread
from edgevlm.engines.profiling.residence import MemoryRecorder
from edgevlm.engines.profiling.roofline import Roofline, Work, roofline
from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.clock import Clock, Span
from edgevlm.engines.runtime.embedding import Embedder, tower_of
from edgevlm.toolkit.images.preprocess import preprocess
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import threads_here
from edgevlm.toolkit.vlm import towers


@dataclass(frozen=True)
class TowerDrift:
    """How far an engine's embeddings are from those of the first of a comparison, on the images of
    the runs: mean and lowest cosine, and relative rms error of all together.
    """

    cosine: float
    lowest_cosine: float
    relative_rms: float
    images: int


@dataclass(frozen=True)
class TowerProfile:
    """The result; the keys of `edgevlm profile --json` for a tower.

    image_ms: of one image by itself, from its file to its embedding. images_per_s: of the engine
    alone, in batches of `batch`. metrics: "image", of whole images, and the stages. context: what
    figures depend on besides. memory: (ms, MB) over the whole time, memory_marks: (ms, what began).
    drift: None without another engine.
    """

    engine: str
    stages: dict[str, Spread]
    image_ms: float
    images_per_s: float
    batch: int
    load_ms: float
    peak_rss_mb: float
    channels: int
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
    drift: TowerDrift | None = None


def is_tower(folder: Path) -> bool:
    """Whether an engine is of a tower by itself. Raises BundleError if it is no engine."""
    return towers.is_tower(manifest.read(folder).model)


def profile_all(
    folders: Sequence[Path], request: ProfileRequest, progress: Progress
) -> list[TowerProfile]:
    """Measure several engines of towers; all are checked before the first is measured."""
    request.check()
    for folder in folders:
        engine = manifest.read(folder)
        tower_of(engine, folder)
        manifest.check(folder, engine)
    first: list[Array] = []
    found = []
    for folder in folders:
        profile, vectors = _profile(folder, request, progress)
        drift = _drift(first, vectors) if len(folders) > 1 else None
        first = first or vectors
        found.append(replace(profile, drift=drift))
    return found


def _profile(
    folder: Path, request: ProfileRequest, progress: Progress
) -> tuple[TowerProfile, list[Array]]:
    """An engine's profile, and its embeddings of the images of the timed runs."""
    memory.forget_peak()
    context = processor_context()
    with MemoryRecorder() as held, _opened(folder, request, held) as tower:
        progress(f"opened in {tower.load_ms:.0f} ms; {request.runs} timed runs")
        runs, vectors = list[Clock](), list[Array]()
        for number in range(-request.warmup, request.runs):
            held.mark("warm-up" if number < 0 else f"run {number + 1}")
            clock, vector = _run(tower, request, max(number, 0))
            if number >= 0:
                runs.append(clock)
                vectors.append(vector)
        held.mark("batches")
        rate = _rate(tower, request)
        context |= device_part()
        resident = memory.peak_rss_mb()
        held.mark("limits")
        peaks = backends.backend(tower.engine.parsed_target()).peaks(folder)
    found = _summarise(folder, tower, request, runs, peaks)
    return replace(
        found,
        images_per_s=round(rate, 3),
        peak_rss_mb=round(resident, 1),
        layers=_layers(folder, request) if request.layers else (),
        context=context,
        memory=tuple(held.samples),
        memory_marks=tuple(held.marks),
    ), vectors


@contextmanager
def _opened(folder: Path, request: ProfileRequest, held: MemoryRecorder) -> Iterator[Embedder]:
    held.mark("opening")
    with Embedder.open(folder, threads=request.threads) as tower:
        yield tower


def _summarise(
    folder: Path, tower: Embedder, request: ProfileRequest, runs: Sequence[Clock], peaks: Peaks
) -> TowerProfile:
    """What follows from the timed runs; all else is filled in later."""
    samples: dict[str, list[float]] = {}
    for clock in runs:
        for stage, ms in clock.totals_ms().items():
            samples.setdefault(stage, []).append(round(ms, 3))
    stages = {stage: spread(values) for stage, values in samples.items()}
    engine = tower.engine
    size = memory.element_bytes(engine.parsed_target(), engine.dtype)
    medians = {stage: one.p50_ms for stage, one in stages.items()}
    whole = [sum(clock.totals_ms().values()) for clock in runs]
    return TowerProfile(
        engine=str(folder),
        stages=stages,
        image_ms=round(float(np.median(whole)), 3),
        images_per_s=0.0,
        batch=tower.batch,
        load_ms=round(tower.load_ms, 1),
        peak_rss_mb=0.0,
        channels=tower.model.channels,
        roofline=roofline(tower.model, engine.plan, peaks, Work(1, 0, 0), medians, size),
        device=device(engine, request.threads or threads_here()),
        samples=samples,
        layers=(),
        spans=tuple(runs[-1].spans),
        metrics={
            name: distribution(values, "ms") for name, values in {"image": whole, **samples}.items()
        },
        size_bytes=sum(file.nbytes for file in engine.files.values()),
    )


def _drift(first: Sequence[Array], vectors: Sequence[Array]) -> TowerDrift | None:
    """Of these embeddings from the first engine's, or themselves; None where lengths differ."""
    pairs = list(zip(first or vectors, vectors, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return None
    wide = [(a.astype(np.float64).ravel(), b.astype(np.float64).ravel()) for a, b in pairs]
    lengths = [max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-24) for a, b in wide]
    cosines = [float(a @ b) / length for (a, b), length in zip(wide, lengths, strict=True)]
    error = sum(float(np.square(a - b).sum()) for a, b in wide)
    whole = sum(float(a @ a) for a, _ in wide)
    rms = float(np.sqrt(error / max(whole, 1e-24)))
    mean, lowest = float(np.mean(cosines)), min(cosines)
    return TowerDrift(round(mean, 7), round(lowest, 7), float(f"{rms:.6g}"), len(pairs))


def _run(tower: Embedder, request: ProfileRequest, number: int) -> tuple[Clock, Array]:
    """One image by itself: its stages, and its embedding."""
    clock = Clock()
    with clock.time("image_decode"):
        loaded = image(request, number)
    with clock.time("preprocess"):
        pixels = _pixels(tower, loaded.rgb)
    with clock.time(f"encoder.{tower.model.encoder.name}"):
        vector = tower.run(pixels)
    return clock, vector


def _pixels(tower: Embedder, rgb: Any) -> Array:
    return preprocess(rgb, tower.model.images.encoders[tower.model.encoder.name])[None]


def _rate(tower: Embedder, request: ProfileRequest) -> float:
    """Images a second of the engine alone, in batches of the usual size."""
    pixels = np.repeat(_pixels(tower, image(request, 0).rgb), tower.batch, 0)
    tower.run(pixels)
    clock = Clock()
    tower.run(pixels)
    return 1000 * tower.batch / clock.now_ms()


def _layers(folder: Path, request: ProfileRequest) -> tuple[LayerShare, ...]:
    """The time of every node, from a separate run, because timing nodes slows a run down."""
    with Embedder.open(folder, threads=request.threads, profile=True) as tower:
        _run(tower, request, 0)
        name = f"encoder.{tower.model.encoder.name}"
        found = [LayerShare(name, n.name, n.op, n.total_ms, n.calls) for n in tower.layers()]
    return tuple(sorted(found, key=lambda layer: -layer.ms))
