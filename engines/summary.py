"""What the artifact verbs say about what they made, would make, or were shown."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines import build as builder
from engines import engine as engines
from engines.engine import Engine
from engines.memory import estimate, peak_rss_mb
from engines.roofline import Floors, floors
from toolkit import systems
from toolkit.bundle import MANIFEST, Bundle, ComponentRecord, Manifest
from toolkit.console import human_bytes, human_count, table
from toolkit.errors import BundleError
from toolkit.layouts.source import Options, Source
from toolkit.models.vlm import components
from toolkit.precision import PrecisionPlan
from toolkit.safetensors_io import STORAGE
from toolkit.strict import read_json, to_plain
from toolkit.weights import TorchReader

Result = tuple[Any, list[str], str]


def planned_bundle(source: Source, dtype: str, out: Path) -> Result:
    """What `export` would write."""
    parts: list[dict[str, Any]] = []
    for part in components(source.model):
        params = sum(math.prod(shape) for shape in part.shapes.values())
        parts.append(
            {"name": part.name, "params": params, "bytes": params * STORAGE[dtype].itemsize}
        )
    total = sum(p["bytes"] for p in parts)
    data = {
        "bundle": str(out),
        "written": False,
        "dtype": dtype,
        "components": parts,
        "bytes": total,
    }
    rows = [(p["name"], human_count(p["params"]), human_bytes(p["bytes"])) for p in parts]
    lines = [
        *table(("component", "parameters", "on disk"), rows),
        f"would write {human_bytes(total)} to {out}",
    ]
    return data, lines, ""


def written_bundle(out: Path) -> Result:
    """What `export` wrote."""
    bundle = Bundle.open(out)
    data = {"bundle": str(out), "written": True} | _bundle_data(bundle)
    nbytes = sum(f.nbytes for f in bundle.manifest.files.values())
    data |= {"bytes": nbytes, "peak_rss_mb": round(peak_rss_mb(), 1)}
    following = shlex.join(["edgevlm", "build", str(out), f"{out}-engine"])
    lines = [*_component_lines(bundle.manifest), f"{out}: {human_bytes(nbytes)}"]
    return data | {"next": following}, lines, following


def _bundle_data(bundle: Bundle) -> dict[str, Any]:
    m = bundle.manifest
    return {
        "kind": "bundle",
        "sha256": bundle.sha256,
        "model": bundle.model.name,
        "system": bundle.model.system,
        "dtype": m.dtype,
        "opset": m.opset,
        "source": dict(m.source),
        "made_by": m.made_by,
        "components": [to_plain(c) for c in m.components],
        "edges": [to_plain(e) for e in m.edges],
        "functions": dict(m.functions),
        "plan": to_plain(m.plan),
    }


def _component_lines(m: Manifest | Engine) -> list[str]:
    files = m.files
    rows = [
        (
            c.name,
            human_count(c.params),
            human_bytes(files[c.weights].nbytes),
            human_count(c.flops) + "FLOP",
            _ports(c),
        )
        for c in m.components
    ]
    return table(("component", "parameters", "weights", "one picture / token", "ports"), rows)


def _ports(record: ComponentRecord) -> str:
    states = {p.updates for p in record.outputs if p.updates}
    inputs = [p.name for p in record.inputs if p.name not in states]
    outputs = [p.name for p in record.outputs if not p.updates]
    kept = f" (+{len(states)} states)" if states else ""
    return f"{', '.join(_short(inputs))} -> {', '.join(_short(outputs))}{kept}"


def _short(names: list[str]) -> list[str]:
    return names if len(names) <= 6 else [*names[:2], "…", names[-1]]


def planned_engine(path: Path, request: builder.Request, explain: bool) -> Result:
    """What `build` would do: memory by use, and the lowering table on demand."""
    bundle = Bundle.open(path)
    context, _ = builder.settled(bundle, request)
    plan = request.again.plan if request.again else bundle.manifest.plan
    memory = estimate(bundle, request.target, context, plan)
    time = floors(bundle.model, plan, request.target)
    decisions = builder.lowering(bundle, request)
    data = {
        "bundle": str(path),
        "target": str(request.target),
        "written": False,
        "memory": asdict(memory) | {"total_bytes": memory.total_bytes},
        "time": to_plain(time),
        "lowering": [to_plain(d) for d in decisions],
    }
    rows = [
        ("weights", human_bytes(memory.weights_bytes)),
        (f"KV cache ({context} positions)", human_bytes(memory.cache_bytes)),
        ("activations", human_bytes(memory.activations_bytes)),
        ("in all", human_bytes(memory.total_bytes)),
    ]
    lines = [*table(("memory", "about"), rows), "", *_floor_lines(time)]
    return data, [*lines, *(_explained(decisions) if explain else [])], ""


def _floor_lines(time: Floors) -> list[str]:
    return [
        f"at best, by this machine's {time.peak_gflop_s:.0f} GFLOP/s, {time.peak_int8_gop_s:.0f} "
        f"GOP/s in 8 bits and {time.peak_gb_s:.1f} GB/s: first token after "
        f"{time.time_to_first_token_ms:.0f} ms ({time.prompt_tokens} prompt tokens, "
        f"{time.image_tokens} of them image), then {time.inter_token_latency_ms:.2f} ms a token"
    ]


def built_engine(made: Engine, out: Path, worked: bool, explain: bool) -> Result:
    """What `build` made or found."""
    following = shlex.join(
        ["edgevlm", "run", str(out), "What is in the picture?", "--image", "PHOTO.jpg"]
    )
    worst = max(made.build.golden_differences.values(), default=0.0)
    if worked:
        line = f"{out}: built for {made.target} in {made.build.seconds:.1f} s"
    else:
        line = f"{out}: already built ({made.build.seconds:.1f} s saved)"
    lines = [*_component_lines(made), *(_explained(list(made.lowering)) if explain else [])]
    lines += [f"{line}; the oracle's answers are met to {worst:.1e}"]
    data = _engine_data(made, out) | {"already_built": not worked, "next": following}
    return data, lines, following


def _explained(decisions: list[engines.Decided]) -> list[str]:
    rows = [(d.component, d.op, d.count, d.action, d.into, d.why) for d in decisions]
    return ["", *table(("component", "op", "count", "action", "into", "why"), rows), ""]


def _engine_data(made: Engine, out: Path) -> dict[str, Any]:
    data: dict[str, Any] = to_plain(made)
    del data["model"]
    return {"kind": "engine", "engine": str(out)} | data


# -- inspect -----------------------------------------------------------------------------------


def inspect(path: Path, torch_reader: TorchReader | None) -> tuple[Any, list[str]]:
    """What a path is. Raises BundleError if it is nothing of ours nor a checkpoint."""
    if (path / engines.DESCRIPTION).exists():
        return _inspect_engine(path)
    if (path / MANIFEST).exists():
        return _inspect_bundle(path)
    if path.suffix == ".json" and path.is_file():
        return _inspect_profile(path)
    if (path / "config.json").exists():
        return _inspect_checkpoint(path, torch_reader)
    what = "is no checkpoint, bundle, engine or profile" if path.exists() else "does not exist"
    raise BundleError(f"{path} {what}")


def _inspect_engine(path: Path) -> tuple[Any, list[str]]:
    made = engines.read(path)
    data = _engine_data(made, path)
    precision = made.precision or made.dtype
    heading = f"engine for {made.target} of {made.bundle}, {precision}, context {made.context}"
    differences = ", ".join(f"{k} {v:.1e}" for k, v in made.build.golden_differences.items())
    lines = [heading, *_component_lines(made), *_plan_lines(made.plan)]
    return data, [*lines, f"differences to the oracle: {differences}"]


def _plan_lines(plan: PrecisionPlan) -> list[str]:
    """What is in fewer bits; nothing where nothing is."""
    if plan == PrecisionPlan():
        return []
    rules = [f"{rule.precision} in {rule.places}" for rule in plan.rules]
    return [f"weights: {', '.join([plan.default, *rules])} ({plan.method})"]


def _inspect_bundle(path: Path) -> tuple[Any, list[str]]:
    bundle = Bundle.open(path)
    bundle.check_sizes()
    m = bundle.manifest
    origin = ", ".join(f"{k} {v}" for k, v in m.source.items())
    heading = f"bundle of {bundle.model.name} ({bundle.model.system}), {m.dtype}, opset {m.opset}"
    functions = ", ".join(m.functions) or "none"
    lines = [heading, *_component_lines(m), *_plan_lines(m.plan)]
    lines += [f"functions: {functions}", f"source: {origin}"]
    return _bundle_data(bundle), [*lines, f"made by: {m.made_by}"]


def _inspect_profile(path: Path) -> tuple[Any, list[str]]:
    data = read_json(path)
    keys = ("engine", "time_to_first_token_ms", "inter_token_latency_ms", "peak_rss_mb")
    if not all(key in data for key in keys):
        raise BundleError(f"{path} is not a profile")
    rows = [(key, data[key]) for key in keys]
    return {"kind": "profile"} | data, table(("profile", "value"), rows)


def _inspect_checkpoint(path: Path, torch_reader: TorchReader | None) -> tuple[Any, list[str]]:
    source = systems.load(path, Options(torch_reader=torch_reader))
    data, lines, _ = planned_bundle(source, "fp32", path)
    parts = ", ".join(
        p.kind for p in (*source.model.encoders, source.model.merger, source.model.lm)
    )
    heading = f"checkpoint of system {source.model.system}: {parts}"
    found = {
        "kind": "checkpoint",
        "system": source.model.system,
        "model": to_plain(source.model),
        "components": data["components"],
    }
    return found, [heading, *lines[:-1]]
