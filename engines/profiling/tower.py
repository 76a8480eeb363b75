"""Profiling an engine of a vision tower by itself: the time of one image, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.engines import backends, manifest
from edgevlm.engines.profiling.asked import ProfileRequest, image
from edgevlm.engines.profiling.context import device_part, processor_context, warnings
from edgevlm.engines.profiling.profile import LayerShare, Progress, Spread, device, spread
from edgevlm.engines.profiling.roofline import Roofline, Work, roofline
from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.clock import Clock, Span
from edgevlm.engines.runtime.embedding import Embedder, tower_of
from edgevlm.toolkit.images.preprocess import preprocess
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.strict import to_plain
from edgevlm.toolkit.target import threads_here
from edgevlm.toolkit.terminal.console import table
from edgevlm.toolkit.vlm import towers


@dataclass(frozen=True)
class TowerProfile:
    """The result; the keys of `edgevlm profile --json` for a tower.

    image_ms: of one image by itself, from its file to its embedding. images_per_s: of the engine
    alone, in batches of `batch`. context: what figures depend on besides.
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
    memory: tuple[tuple[float, float], ...] = ()
    memory_marks: tuple[tuple[float, str], ...] = ()
    context: Mapping[str, Any] = field(default_factory=dict)


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
    return [_profile(folder, request, progress) for folder in folders]


def _profile(folder: Path, request: ProfileRequest, progress: Progress) -> TowerProfile:
    memory.forget_peak()
    context = processor_context()
    with Embedder.open(folder, threads=request.threads) as tower:
        progress(f"opened in {tower.load_ms:.0f} ms; {request.runs} timed runs")
        runs = [_run(tower, request, n) for n in range(request.warmup + request.runs)]
        runs = runs[request.warmup :]
        rate = _rate(tower, request)
        context |= device_part()
        resident = memory.peak_rss_mb()
        peaks = backends.backend(tower.engine.parsed_target()).peaks(folder)
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
        str(folder),
        stages,
        round(float(np.median(whole)), 3),
        round(rate, 3),
        tower.batch,
        round(tower.load_ms, 1),
        round(resident, 1),
        tower.model.channels,
        roofline(tower.model, engine.plan, peaks, Work(1, 0, 0), medians, size),
        device(engine, request.threads or threads_here()),
        samples,
        _layers(folder, request) if request.layers else (),
        tuple(runs[-1].spans),
        context=context,
    )


def _run(tower: Embedder, request: ProfileRequest, number: int) -> Clock:
    """One image by itself."""
    clock = Clock()
    with clock.time("image_decode"):
        loaded = image(request, number)
    with clock.time("preprocess"):
        pixels = _pixels(tower, loaded.rgb)
    with clock.time(f"encoder.{tower.model.encoder.name}"):
        tower.run(pixels)
    return clock


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


def result(profiles: Sequence[TowerProfile], layers: int) -> tuple[Any, list[str]]:
    """Data and lines of `edgevlm profile`; `compared` holds engines beyond the first."""
    data = to_plain(profiles[0])
    if len(profiles) > 1:
        data["compared"] = [to_plain(p) for p in profiles[1:]]
    return data, [line for p in profiles for line in [p.engine, *lines(p, layers), ""]]


def lines(p: TowerProfile, layers: int) -> list[str]:
    """The profile as text: stages with their floor, then totals, then the slowest layers."""
    bounds = {bound.stage: bound for bound in p.roofline.stages}
    rows = []
    for stage, one in p.stages.items():
        bound = bounds.get(stage)
        floor = ("", "")
        if bound:
            floor = f"{bound.floor_ms:.3g}", f"{bound.reached:.0%} ({bound.limited_by})"
        rows.append((stage, one.p50_ms, one.p90_ms, one.p99_ms, *floor))
    text = table(("stage", "p50 ms", "p90 ms", "p99 ms", "floor ms", "reached"), rows)
    text += [
        "",
        f"an image by itself     {p.image_ms:.1f} ms, {p.channels} channels",
        f"in batches of {p.batch}        {p.images_per_s:.3g} images/s (the engine alone)",
        f"load / peak memory     {p.load_ms:.0f} ms / {p.peak_rss_mb:.0f} MB",
        f"device                 {p.device.get('card') or p.device['processor']}, "
        f"{p.device['threads']} threads, {p.device['target']}, {p.device['precision']}",
        *(f"warning                {line}" for line in warnings(p.context)),
    ]
    if layers and p.layers:
        top = [(s.component, s.name, s.op, s.calls, s.ms) for s in p.layers[:layers]]
        text += ["", *table(("component", "layer", "op", "calls", "ms"), top)]
    return text
