"""Fused plugins and whole engines tried on this machine, for one report that a user can send.

A plugin is built alone, as a network of one op, and so is what the builder makes of the op's body;
both run on the same random numbers, are compared with the reference and timed. What they took is
kept for `build --plugins auto`. An engine replays its goldens, and each of its calls is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edgevlm.engines import backends, manifest
from edgevlm.engines.backends import BuildOptions, Compiled, Runner, RunnerOptions, Shapes
from edgevlm.engines.build import check, plugins, verify
from edgevlm.engines.plugins import selftest as kernels
from edgevlm.engines.plugins.alone import Alone, alone
from edgevlm.engines.plugins.catalogue import SITES, SMALL, Site
from edgevlm.toolkit.bundle.goldens import Golden, relative_rms
from edgevlm.toolkit.bundle.manifest import GOLDENS, ComponentRecord
from edgevlm.toolkit.errors import AccuracyError, TargetMismatch, ToolkitError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import Target, card
from edgevlm.toolkit.terminal.device import device_context
from edgevlm.toolkit.vlm.components import Component

Progress = Callable[[str], None]
# Writes a component into a folder in a number format, with these weights.
Record = Callable[[Path, Component, str, Mapping[str, Array]], ComponentRecord]
_DTYPE = "fp16"  # what engines for cards compute in
_RUNS, _BATCHES = 20, 5


def report(made_by: str, tried: Mapping[str, Any]) -> dict[str, Any]:
    """What was tried, with the machine, the program and the date."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    head = {"kind": "selftest", "made_by": made_by, "date": now, "device": device_context()}
    return {**head, **tried}


# -- plugins ----------------------------------------------------------------------------------


def of_plugins(
    names: Collection[str], record: Record, progress: Progress, *, small: bool = False
) -> dict[str, Any]:
    """Every call of these ops in our presets, or small ones: plugin and body, right and how fast.

    Raises TargetMismatch naming what this machine lacks. What fails for one call is told in its
    place, as that is what a report is for.
    """
    here = _card_here()
    for plugin in names:
        plugins.refuse_target(here, (plugin,))
    generator = np.random.default_rng(seed := int(np.random.SeedSequence().generate_state(1)[0]))
    sites = [site for site in (SMALL if small else SITES) if site.op in names]
    rows = [_row(site, here, generator, record, progress) for site in sites]
    if not small:
        plugins.keep(here, _times(rows))
    progress("kernels alone")
    return {"target": str(here), "seed": seed, "plugins": rows, "kernels": _kernels(sites, seed)}


def right(row: Mapping[str, Any]) -> bool:
    """Whether a call's plugin gives what the reference does."""
    return bool(row["plugin"].get("right"))


def _card_here() -> Target:
    """This machine's card, as TensorRT builds for it."""
    here = backends.backend(Target("tensorrt", (), card.NO_DEVICE)).here()
    missing = []
    if not here.version:
        missing.append("TensorRT is not installed (pip install 'edgevlm[tensorrt]')")
    if here.arch == card.NO_DEVICE:
        missing.append("there is no NVIDIA card that its driver knows")
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        missing.append("cuda-core is not installed (pip install 'edgevlm[kernels]')")
    if missing:
        raise TargetMismatch(
            f"fused plugins cannot be tried on this machine: {'; '.join(missing)}",
            hint="run it on the device itself; edgevlm doctor shows what is here",
        )
    return here


def _row(
    site: Site, here: Target, generator: np.random.Generator, record: Record, progress: Progress
) -> dict[str, Any]:
    """One call, built with its plugin and without."""
    asked = alone(site, _DTYPE, generator)
    floor = site.work(_DTYPE).floor_bytes
    row: dict[str, Any] = {"site": site.name, "op": site.op, "dtype": _DTYPE, "floor_bytes": floor}
    with TemporaryDirectory() as name:
        source = Path(name, "source")
        source.mkdir()
        written = record(source, asked.component, _DTYPE, asked.weights)
        forms = {"plugin": BuildOptions((site.op,)), "body": BuildOptions()}
        for kind, options in forms.items():
            progress(f"{site.name}: {kind}")
            folder = Path(name, kind)
            folder.mkdir()
            try:
                row[kind] = _tried(asked, source, written, folder, here, options)
            except ToolkitError as refused:
                row[kind] = {"error": refused.message, "hint": refused.hint, "right": False}
    both = [row[kind].get("ms") for kind in ("plugin", "body")]
    row["gain"] = None if None in both else round(1 - both[0] / both[1], 4)
    return row


def _tried(
    asked: Alone,
    source: Path,
    record: ComponentRecord,
    folder: Path,
    here: Target,
    how: BuildOptions,
) -> dict[str, Any]:
    """Build one form of a call, compare it and time it."""
    backend = backends.backend(here, how)
    started = time.perf_counter()
    made = backend.compile(source, _DTYPE, record, folder, here, Shapes(1, ({},)))
    build_s = time.perf_counter() - started

    def opened(*, profile: bool) -> Any:
        options = RunnerOptions(context=1, profile=profile, plugins=made.plugins)
        return backend.open(folder, made.record, {}, options)

    runner = opened(profile=False)
    try:
        outputs = runner.run(asked.inputs)
        ms = 1000 * min(runner.seconds(asked.inputs, _RUNS) for _ in range(_BATCHES))
    finally:
        runner.close()
    worst = max(relative_rms([(outputs[n], y)]) for n, y in asked.expected.items())
    return {
        "difference": worst,
        "right": worst <= check.TOLERANCE[_DTYPE],
        "ms": ms,
        "build_s": build_s,
        "plan_bytes": made.plan.plan_bytes if made.plan else 0,
        "layers": _layers(opened(profile=True), asked.inputs),
    }


def _layers(runner: Runner, inputs: Mapping[str, Array]) -> list[dict[str, Any]]:
    """What TensorRT says that each kernel takes, with the cost of asking, in one run."""
    try:
        for _ in range(_RUNS):
            runner.run(inputs)
        return [
            {"name": layer.name, "op": layer.op, "ms": layer.total_ms / layer.calls}
            for layer in runner.layers()
        ]
    finally:
        runner.close()


def _times(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Milliseconds of plugin and body by op, over its calls; without those that are not right."""
    found = {}
    for op in {row["op"] for row in rows}:
        own = [row for row in rows if row["op"] == op]
        if all(right(row) and "ms" in row["body"] for row in own):
            plugin, body = (sum(row[kind]["ms"] for row in own) for kind in ("plugin", "body"))
            found[op] = (plugin, body)
    return found


def _kernels(sites: Sequence[Site], seed: int) -> dict[str, Any]:
    """The kernels alone, in all formats, without TensorRT; or why they cannot run here."""
    if find_spec("triton") is None:
        return {"error": "Triton is not installed", "hint": "pip install 'edgevlm[kernels]'"}
    try:
        return kernels.report(kernels.Card(), sites, seed)
    except ToolkitError as refused:
        return {"error": refused.message, "hint": refused.hint}


# -- engines ----------------------------------------------------------------------------------


def of_engine(folder: Path, progress: Progress) -> dict[str, Any]:
    """Every component of an engine: how long it takes to open and to answer, and how exact it is.

    Raises TargetMismatch on another machine, BundleError where a file is missing or changed.
    """
    engine = manifest.read(folder)
    manifest.check(folder, engine)
    calls = verify.goldens_of(folder, engine)
    comparable = engine.precision is None or (folder / GOLDENS).exists()
    rows = []
    for record in engine.components:
        progress(f"{record.name}: {len(calls)} calls")
        own = [golden for golden in calls if golden.component == record.name]
        row = _timed(folder, engine, record, own)
        row |= _compared(folder, engine, record, calls) if comparable else {"difference": None}
        rows.append(row)
    facts = {"target": engine.target, "precision": engine.precision, "dtype": engine.dtype}
    names = [plugin.op for plugin in engine.plugins]
    return {"engine": {"path": str(folder), **facts, "plugins": names, "components": rows}}


def _timed(
    folder: Path, engine: manifest.Engine, record: ComponentRecord, calls: Sequence[Golden]
) -> dict[str, Any]:
    """Milliseconds of opening a component, and of each golden call, host and copies included."""
    backend = backends.backend(engine.parsed_target())
    started = time.perf_counter()
    options = RunnerOptions(engine.context, plugins=engine.plugins)
    runner = backend.open(folder, record, engine.model, options)
    row: dict[str, Any] = {"name": record.name, "open_ms": 1000 * (time.perf_counter() - started)}
    row["refit_ms"] = getattr(runner, "refit_ms", 0.0)
    row["bytes"] = {
        n: engine.files[n].nbytes for n in dict.fromkeys((record.graph, record.weights))
    }
    try:
        state = runner.new_state()
        row["calls"] = [
            {
                "shapes": {name: list(array.shape) for name, array in golden.inputs.items()},
                "ms": _median_ms(lambda g=golden: runner.run(g.inputs, state)),  # type: ignore[misc]
            }
            for golden in calls
        ]
    finally:
        runner.close()
    return row


def _median_ms(run: Callable[[], Any]) -> float:
    taken = []
    for _ in range(_BATCHES + 1):
        start = time.perf_counter()
        run()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken[1:])  # the first one binds memory


def _compared(
    folder: Path, engine: manifest.Engine, record: ComponentRecord, calls: list[Golden]
) -> dict[str, Any]:
    """The error of a component against the reference, and whether it is within its tolerance."""
    precision = "int8" if engine.plan.precisions else engine.dtype
    part = Compiled(record, (), precision, plugins=engine.plugins)
    backend = backends.backend(engine.parsed_target())
    where = engine.model, engine.context, [part], backend, folder
    try:
        errors = check.compare(calls, *where, float("inf"), lambda _: None)
    except AccuracyError as wrong:
        return {"difference": None, "right": False, "error": wrong.message}
    limit = check.tolerance(part)
    return {"difference": errors.kernels[record.name], "allowed": limit, "right": True}
