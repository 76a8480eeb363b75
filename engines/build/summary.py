"""What the verbs print about engines: those to build, just built, or on disk."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgevlm.engines import manifest
from edgevlm.engines.backends import Plugin, native
from edgevlm.engines.build import build as builder
from edgevlm.engines.build import check
from edgevlm.engines.lowering.capabilities import Decision
from edgevlm.engines.manifest import Engine, Trial
from edgevlm.engines.native import library as libraries
from edgevlm.engines.profiling.roofline import Floors, floors, floors_of_devices
from edgevlm.engines.runtime.memory import estimate
from edgevlm.toolkit.bundle import trained
from edgevlm.toolkit.bundle.manifest import MANIFEST, Bundle, FileRecord
from edgevlm.toolkit.strict import to_plain
from edgevlm.toolkit.terminal.console import human_bytes, table
from edgevlm.toolkit.terminal.summary import (
    Result,
    component_lines,
    generation_data,
    generation_lines,
    plan_lines,
    unknown,
    whole,
)
from edgevlm.toolkit.vlm import towers


def planned_engine(path: Path, request: builder.Request, explain: bool) -> Result:
    """What `build` would do: memory by use, and the lowering table on demand."""
    bundle = Bundle.open(path)
    context, _ = builder.settled(bundle, request)
    plan = request.plan(bundle)
    check.allowed_loss(plan, request.accept_loss)
    second = request.tuning.prompts.plan if request.tuning.prompts else None
    memory = estimate(bundle, request.target, context, plan, second)
    what = bundle.model, plan, request.target, bundle.manifest.dtype
    on_card = request.target.arch.startswith("sm_")
    times = floors_of_devices(*what) if on_card else {"this machine": floors(*what)}
    decisions = builder.lowering(bundle, request)
    native_kernels = {c: [k.name for k in ours] for c, ours in request.tuning.native.items()}
    data = {
        "bundle": str(path),
        "target": str(request.target),
        "written": False,
        "memory": asdict(memory) | {"total_bytes": memory.total_bytes},
        "time": {name: to_plain(time) for name, time in times.items()},
        "lowering": [to_plain(d) for d in decisions],
        "native": native_kernels,
    }
    rows = [
        ("weights", human_bytes(memory.weights_bytes)),
        *(
            [(f"KV cache ({context} positions)", human_bytes(memory.cache_bytes))]
            if context
            else []
        ),
        ("activations", human_bytes(memory.activations_bytes)),
        ("in all", human_bytes(memory.total_bytes)),
    ]
    lines = [*table(("memory", "about"), rows), ""]
    lines += [line for name, time in times.items() for line in _floor_lines(name, time)]
    if explain:
        lines += [*_explained(decisions), *_timed(request.tuning.trials)]
    lines += [f"{name}: our kernels {', '.join(k)}" for name, k in native_kernels.items()]
    return data, lines, ""


def _floor_lines(name: str, time: Floors) -> list[str]:
    peaks = (
        f"at best, by {name}'s {time.peak_gflop_s:.0f} GFLOP/s, {time.peak_int8_gop_s:.0f} "
        f"GOP/s in 8 bits and {time.peak_gb_s:.1f} GB/s"
    )
    if not time.prompt_tokens:
        return [f"{peaks}: an image after {time.time_to_first_token_ms:.3g} ms"]
    return [
        f"{peaks}: first token after {time.time_to_first_token_ms:.3g} ms "
        f"({time.prompt_tokens} prompt tokens, {time.image_tokens} of them image), then "
        f"{time.inter_token_latency_ms:.3g} ms a token"
    ]


def built_engine(engine: Engine, out: Path, written: bool, explain: bool) -> Result:
    """The engine that `build` wrote, or kept if not `written`."""
    words = ["edgevlm", "run", str(out), "What is in the image?", "--image", "PHOTO.jpg"]
    if towers.is_tower(engine.model):
        words = ["edgevlm", "embed", str(out), "PHOTOS", "-o", "features.npz"]
    following = shlex.join(words)
    if written:
        line = f"{out}: built for {engine.target} in {engine.build.seconds:.1f} s"
    else:
        line = f"{out}: already built ({engine.build.seconds:.1f} s saved)"
    lines = component_lines(engine)
    lines += _planned(engine)
    if explain:
        lines += [*_explained(list(engine.lowering)), *_timed(engine.trials)]
    lines += [f"{line}; {_errors(engine)}"]
    if not engine.verified:
        following = shlex.join(["edgevlm", "verify", str(out)])
    data = _engine_data(engine, out) | {"already_built": not written, "next": following}
    return data, lines, following


def with_lowering(result: Result, decisions: Sequence[Decision]) -> Result:
    """What `export` prints, with the lowering table of `--for`."""
    data, lines, following = result
    if not decisions:
        return result
    table = [*_explained(list(decisions))]
    return data | {"lowering": [to_plain(d) for d in decisions]}, [*table, *lines], following


def _explained(decisions: list[Decision]) -> list[str]:
    rows = [(d.component, d.op, d.count, d.action, d.into, d.why) for d in decisions]
    return ["", *table(("component", "op", "count", "action", "into", "why"), rows), ""]


def _timed(trials: Sequence[Trial]) -> list[str]:
    """What was timed to choose number formats."""
    if not trials:
        return []
    rows = [
        (t.component, t.call, t.precision, f"{t.ms:.2f}", "chosen" if t.chosen else "")
        for t in trials
    ]
    return [*table(("component", "linears of a", "precision", "ms", ""), rows), ""]


def _planned(engine: Engine) -> list[str]:
    """What TensorRT's builder made of each component."""
    rows = [
        (
            name,
            plan.layers,
            plan.kernels,
            f"{plan.fused_attentions} of {plan.attentions}",
            f"{plan.rounded_kernels} of {plan.rounded}" if plan.rounded else "-",
            f"{human_bytes(plan.held_weights_bytes)} of {human_bytes(plan.given_weights_bytes)}",
            human_bytes(plan.plan_bytes),
            f"{plan.peak_rss_mb:.0f} MB",
            f"{plan.seconds:.0f} s",
        )
        for name, plan in engine.plans.items()
    ]
    heads = (
        *("plan of", "layers", "kernels", "attentions fused", "in 8 bits", "weights held"),
        *("plan", "peak", ""),
    )
    lines = ["", *table(heads, rows)] if rows else []
    for plugin in engine.plugins:
        where = "our library" if plugin.library else "the plan"
        if native.is_ours(plugin):
            lines.append(f"{plugin.op}: {_kernel_here(plugin)}")
            continue
        lines.append(f"{plugin.op}: plugin {plugin.namespace}::{plugin.name}, kernel in {where}")
    return lines


def _kernel_here(plugin: Plugin) -> str:
    """Whether a kernel of ours for processors runs on this machine."""
    library = libraries.native()
    name = f"our kernel {plugin.name}"
    if library.path is None:
        return f"ONNX Runtime's kernel here, not {name}: {library.why}"
    return name


def _engine_data(engine: Engine, out: Path) -> dict[str, Any]:
    data: dict[str, Any] = to_plain(engine)
    del data["model"]
    data["generation"] = generation_data(engine.parsed_model())
    return {"kind": "engine", "engine": str(out)} | data


def inspect_engine(path: Path) -> tuple[Any, list[str]]:
    """What an engine holds."""
    engine = manifest.read(path)
    data = _engine_data(engine, path)
    precision = engine.precision or engine.dtype
    kind = f"context {engine.context}" if engine.context else "a vision tower by itself"
    heading = f"engine for {engine.target} of {engine.bundle}, {precision}, {kind}"
    rows = [
        (name, f"{error:.1e}", percent(engine.build.precision_losses.get(name)))
        for name, error in engine.build.kernel_differences.items()
    ]
    lines = [heading, *component_lines(engine), *plan_lines(engine.plan)]
    if engine.prompt_form is not None:
        lines.append(f"prompts: {engine.prompt_form.record.weights}")
        lines += plan_lines(engine.prompt_form.plan)
    lines += [*_timed(engine.trials), *_planned(engine)]
    lines += [*generation_lines(engine.parsed_model()), ""]
    lines += table(("relative rms error", "of kernels", "of the precision"), rows)
    return data, [*lines, _errors(engine)]


def examined(path: Path) -> tuple[Any, list[str]]:
    """Every byte of an artifact is read: data, and lines for people, if it is as it was written.

    Raises BundleError or CheckpointError naming what is damaged.
    """
    files: Mapping[str, FileRecord]
    if (path / manifest.DESCRIPTION).exists():
        engine = manifest.read(path)
        files = engine.files
        manifest.examine(path, engine)
    elif (path / MANIFEST).exists():
        bundle = Bundle.open(path)
        files = bundle.manifest.files
        bundle.verify()
    elif trained.is_trained(path):
        files = trained.verify(path).files
    else:
        raise unknown(path)
    return whole(path, files)


def _errors(engine: Engine) -> str:
    """The errors of the worst component, as text."""
    kernels, losses = engine.build.kernel_differences, engine.build.precision_losses
    if not engine.verified:
        return "not verified: no card here to compare it with the reference"
    text = f"kernels right to {max(kernels.values(), default=0.0):.1e}"
    if not losses:
        return text
    chosen = [trial.precision for trial in engine.trials if trial.chosen]
    if engine.precision and chosen and set(chosen) == {"float"}:
        return (
            f"{text}; nothing is in {engine.precision}, as float is faster here (--keep-slower "
            "quantizes it all the same)"
        )
    name = max(losses, key=lambda component: losses[component])
    accepted = engine.build.accepted_loss
    note = "" if accepted is None else f"; {percent(accepted)} was accepted"
    precision = engine.precision or "this precision"
    return f"{text}; {precision} costs {percent(losses[name])} (rms, {name}) against float{note}"


def percent(share: float | None) -> str:
    """0.0081 as "0.81 %", to two digits; a dash for none."""
    if share is not None and 0 < share < 1e-5:
        return "less than 0.001 %"
    return "-" if share is None else f"{100 * share:.2g} %"
