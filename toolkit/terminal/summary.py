"""What the verbs print about checkpoints, bundles and saved profiles."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle import trained
from edgevlm.toolkit.bundle.manifest import MANIFEST, Bundle, ComponentRecord, FileRecord
from edgevlm.toolkit.checkpoints import hub
from edgevlm.toolkit.checkpoints.layouts.source import AnySource, Options
from edgevlm.toolkit.checkpoints.safetensors_io import STORAGE
from edgevlm.toolkit.errors import BundleError
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.strict import read_json, to_plain
from edgevlm.toolkit.terminal.console import human_bytes, human_count, table
from edgevlm.toolkit.vlm.components import components
from edgevlm.toolkit.vlm.cost import stored_bytes
from edgevlm.toolkit.vlm.generation import described
from edgevlm.toolkit.vlm.towers import Model, TowerConfig

Result = tuple[Any, list[str], str]


class Described(Protocol):
    """A manifest, of a bundle or of an engine."""

    @property
    def components(self) -> Sequence[ComponentRecord]: ...

    @property
    def files(self) -> Mapping[str, FileRecord]: ...


def planned_bundle(source: AnySource, dtype: str, out: Path) -> Result:
    """What `export` would write."""
    sizes: list[dict[str, Any]] = []
    size = STORAGE[dtype].itemsize
    planned = source.plan.precisions
    stored = stored_bytes(source.model, source.plan, size) if planned else {}
    for component in components(source.model):
        params = sum(math.prod(shape) for shape in component.shapes.values())
        nbytes = stored.get(component.name, params * size)
        sizes.append({"name": component.name, "params": params, "bytes": nbytes})
    total = sum(size["bytes"] for size in sizes)
    data = {
        "bundle": str(out),
        "written": False,
        "dtype": dtype,
        "components": sizes,
        "bytes": total,
        "generation": generation_data(source.model),
        **_template(source.origin),
    }
    rows = [(s["name"], human_count(s["params"]), human_bytes(s["bytes"])) for s in sizes]
    lines = [
        *table(("component", "parameters", "on disk"), rows),
        *plan_lines(source.plan),
        *generation_lines(source.model),
        *template_line(source.origin),
        f"would write {human_bytes(total)} to {out}",
    ]
    return data, lines, ""


def written_bundle(out: Path, peak_rss_mb: float) -> Result:
    """What `export` wrote; peak_rss_mb: the most memory that it held."""
    bundle = Bundle.open(out)
    data = {"bundle": str(out), "written": True} | _bundle_data(bundle)
    nbytes = sum(f.nbytes for f in bundle.manifest.files.values())
    data |= {"bytes": nbytes, "peak_rss_mb": round(peak_rss_mb, 1)}
    following = shlex.join(["edgevlm", "build", str(out), f"{out}-engine"])
    m = bundle.manifest
    lines = [*component_lines(m), *template_line(m.source), *generation_lines(bundle.model)]
    lines += [f"{out}: {human_bytes(nbytes)}"]
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
        "generation": generation_data(bundle.model),
    }


def component_lines(m: Described) -> list[str]:
    """A table of components: sizes, work, ports."""
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
    return table(("component", "parameters", "weights", "one image / token", "ports"), rows)


def _ports(record: ComponentRecord) -> str:
    states = {p.updates for p in record.outputs if p.updates}
    inputs = [p.name for p in record.inputs if p.name not in states]
    outputs = [p.name for p in record.outputs if not p.updates]
    kept = f" (+{len(states)} states)" if states else ""
    return f"{', '.join(_short(inputs))} -> {', '.join(_short(outputs))}{kept}"


def _short(names: list[str]) -> list[str]:
    return names if len(names) <= 6 else [*names[:2], "…", names[-1]]


def _template(origin: Mapping[str, Any]) -> dict[str, str]:
    return {"template": str(origin["template"])} if "template" in origin else {}


def template_line(origin: Mapping[str, Any]) -> list[str]:
    """Which conversation template `auto` is, and why; no line for a preset."""
    return [f"template: {text}" for text in _template(origin).values()]


def plan_lines(plan: PrecisionPlan) -> list[str]:
    """Which weights are quantized; no line if none are."""
    if plan == PrecisionPlan():
        return []
    rules = [f"{rule.precision} in {rule.paths}" for rule in plan.rules]
    return [f"weights: {', '.join([plan.default, *rules])} ({plan.method})"]


def generation_lines(model: Model) -> list[str]:
    """What the checkpoint says about choosing tokens; no line if it says nothing.

    Of a tower by itself in its place what it makes of an image.
    """
    if isinstance(model, TowerConfig):
        height, width = model.pixels
        made = f"{model.channels} channels, pooled by {model.pooling}"
        return [f"embedding: {made}, of images of {width} x {height}"]
    text = described(model.generation)
    return [f"generation: {text}"] if text else []


def generation_data(model: Model) -> dict[str, Any]:
    """The settings for choosing tokens that differ from their defaults; none of a tower."""
    return {} if isinstance(model, TowerConfig) else dict(model.generation.stated())


def inspect(path: Path, options: Options) -> tuple[Any, list[str]]:
    """What a bundle, saved profile or checkpoint is. Raises BundleError for anything else.

    options: how a checkpoint is read.
    """
    if (path / MANIFEST).exists():
        return inspect_bundle(path)
    if path.suffix == ".json" and path.is_file():
        return inspect_profile(path)
    if trained.is_trained(path):
        return inspect_trained(path)
    if (path / "config.json").exists() or (path.is_file() and path.suffix in hub.FILES):
        return inspect_checkpoint(path, options)
    raise unknown(path)


def inspect_bundle(path: Path) -> tuple[Any, list[str]]:
    """What a bundle holds."""
    bundle = Bundle.open(path)
    bundle.check_sizes()
    m = bundle.manifest
    origin = ", ".join(f"{k} {v}" for k, v in m.source.items() if k != "template")
    heading = f"bundle of {bundle.model.name} ({bundle.model.system}), {m.dtype}, opset {m.opset}"
    functions = ", ".join(m.functions) or "none"
    lines = [heading, *component_lines(m), *plan_lines(m.plan)]
    lines += [*template_line(m.source), *generation_lines(bundle.model)]
    lines += [f"functions: {functions}", f"source: {origin}"]
    return _bundle_data(bundle), [*lines, f"made by: {m.made_by}"]


def inspect_profile(path: Path) -> tuple[Any, list[str]]:
    """The figures of a saved profile. Raises BundleError if it is none."""
    data = read_json(path)
    of_models = ("engine", "time_to_first_token_ms", "inter_token_latency_ms", "peak_rss_mb")
    of_towers = ("engine", "image_ms", "images_per_s", "peak_rss_mb")
    keys = next((k for k in (of_models, of_towers) if all(key in data for key in k)), None)
    if keys is None:
        raise BundleError(f"{path} is not a profile")
    rows = [(key, data[key]) for key in keys]
    return {"kind": "profile"} | data, table(("profile", "value"), rows)


def inspect_checkpoint(path: Path, options: Options) -> tuple[Any, list[str]]:
    """Which system a checkpoint is of, and its components."""
    return _described(systems.load_any(path, options), "fp32", path)


def inspect_trained(path: Path) -> tuple[Any, list[str]]:
    """What a checkpoint that training wrote holds, and how it was made."""
    d = trained.read_description(path)
    data, lines = _described(systems.load(path, Options()), d.dtype, path)
    facts = {"dtype": d.dtype, "origin": dict(d.origin), "training": dict(d.training)}
    told = [
        f"{name}: {', '.join(f'{k} {v}' for k, v in values.items() if _for_people(k, v))}"
        for name, values in (("trained from", d.origin), ("training", d.training))
        if values
    ]
    return {**data, **facts, "made_by": d.made_by}, [*lines, *told, f"made by: {d.made_by}"]


def _for_people(key: str, value: Any) -> bool:
    """Whether a fact of a training is shown; hashes and earlier trainings are in the JSON."""
    return key != "template" and not key.endswith("sha256") and not isinstance(value, Mapping)


def _described(source: AnySource, dtype: str, path: Path) -> tuple[Any, list[str]]:
    data, lines, _ = planned_bundle(source, dtype, path)
    model = source.model
    if isinstance(model, TowerConfig):
        heading = f"vision tower by itself: {model.system}"
    else:
        kinds = ", ".join(c.kind for c in (*model.encoders, model.merger, model.lm))
        heading = f"checkpoint of system {model.system}: {kinds}"
    result = {
        "kind": "checkpoint",
        "system": model.system,
        "model": to_plain(model),
        "components": data["components"],
        **_template(source.origin),
    }
    return result, [heading, *lines[:-1]]


def whole(path: Path, files: Mapping[str, FileRecord]) -> tuple[Any, list[str]]:
    """Files that are all as they were written."""
    nbytes = sum(record.nbytes for record in files.values())
    rows = [
        (name, human_bytes(record.nbytes), record.sha256[:16]) for name, record in files.items()
    ]
    data = {
        "kind": "examination",
        "path": str(path),
        "files": {name: record.sha256 for name, record in files.items()},
        "bytes": nbytes,
        "problems": [],
    }
    lines = [*table(("file", "size", "sha256"), rows), ""]
    return data, [*lines, f"{path}: {len(files)} files, {human_bytes(nbytes)}, all as written"]


def unknown(path: Path) -> BundleError:
    """The error for a path that is nothing we know."""
    what = "is no checkpoint, bundle, engine or profile" if path.exists() else "does not exist"
    return BundleError(
        f"{path} {what}",
        hint="name a folder with config.json, checkpoint.json, manifest.json or engine.json, or a "
        "weight file",
    )
