"""From a lowered component to a plan: shapes fixed, weights in signed codes, a process a build."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.engines.backends import PlanReport, Shapes, Size
from edgevlm.engines.backends.common import place
from edgevlm.engines.backends.tensorrt import codes, kernels, plugins
from edgevlm.engines.backends.tensorrt.arrays import ROW_AXES
from edgevlm.engines.backends.tensorrt.device import CardFacts
from edgevlm.engines.backends.tensorrt.kernels import Kernel
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.errors import BuildError, OutOfMemory, ToolkitError
from edgevlm.toolkit.target import Target
from edgevlm.toolkit.vlm.components import Port

if TYPE_CHECKING:
    import onnx

# A plan that holds a smaller part of the weights that it was given is no engine of the model: a
# profile has folded it into a constant.
LEAST_WEIGHTS = 0.5
_FORMATS = {3: "Int8", 17: "FP8"}  # as the builder's log names those of TensorProto
_CODES = {*_FORMATS, 22}  # and INT4
_OUT_OF_MEMORY = ("OutOfMemory", "out of memory", "bad_alloc", "Requested size", "workspace limit")


@dataclass(frozen=True)
class Job:
    """What worker.py is told.

    profiles: for each the smallest, usual and largest shape by input, of inputs that change.
    capabilities: names of TensorRT-RTX; empty for the card at hand. workspace_bytes: the most that
    a kernel may work in, 0 for no limit. timing_cache: a file to read and to add to, "" for none.
    plugins: what to register before parsing, see plugins.to_register. strip: leave the weights out.
    """

    module: str
    graph: str
    plan: str
    profiles: list[dict[str, list[list[int]]]]
    capabilities: list[str]
    workspace_bytes: int
    timing_cache: str
    plugins: dict[str, Any] = field(default_factory=dict)
    strip: bool = False


@dataclass(frozen=True)
class Built:
    """What became of a job: its result, the builder's log, how many profiles it had, and the most
    sequences or images of one call.
    """

    result: Mapping[str, Any]
    log: str
    profiles: int
    rows: int


def timing_cache(here: Target, card: CardFacts) -> str:
    """The file in the user's cache folder with what kernels took on this card, for later builds.

    Times hold for one release of TensorRT, kind of card and release of CUDA.
    """
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{here} {card.name} cuda {card.cuda}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(cache / "edgevlm" / "timing" / f"{name}.cache")


def fix(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Make named dimensions numbers."""
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def fixed_sizes(shapes: Shapes) -> dict[str, int]:
    """The dimensions that are the same in every profile, smallest and largest alike."""
    fixed = {"context": shapes.context}
    first, *others = shapes.profiles
    for name, size in first.items():
        same = size[0] == size[2] and all(other[name] == size for other in others)
        if same:
            fixed[name] = size[0]
    return fixed


def sharing(shapes: Shapes, model: onnx.ModelProto) -> Shapes:
    """The profiles that TensorRT-RTX makes of one copy of the weights, but for that of one token.

    For several sequences it would store codes again, which floats are shared: 1.8 times the plan of
    Qwen2.5-0.5B in 4 bits. Such sequences get their tokens one after the other.
    """
    stored = {t.data_type for t in model.graph.initializer if t.data_location == t.EXTERNAL}
    if not stored & _CODES:
        return shapes
    alone = [p for p in shapes.profiles if p.get("batch", (1, 1, 1))[2] == 1]
    return replace(shapes, profiles=tuple(alone))


def most_rows(shapes: Shapes) -> int:
    """The most sequences, or images, of one call."""
    sizes = [
        profile[axis][2] for profile in shapes.profiles for axis in ROW_AXES if axis in profile
    ]
    return max(sizes, default=1)


def profiles(
    ports: Sequence[Port], shapes: Shapes, fixed: Mapping[str, int]
) -> list[dict[str, list[list[int]]]]:
    """The smallest, usual and largest shape of every input with a dimension that changes."""
    result = []
    for sizes in shapes.profiles:
        result.append(
            {
                port.name: [[_size(d, sizes, fixed, k) for d in port.shape] for k in range(3)]
                for port in ports
                if any(isinstance(d, str) and d not in fixed for d in port.shape)
            }
        )
    return result


def _size(dim: int | str, sizes: Mapping[str, Size], fixed: Mapping[str, int], k: int) -> int:
    """A dimension in a profile; k: 0 for the smallest, 1 for the usual, 2 for the largest."""
    if isinstance(dim, int):
        return dim
    return fixed[dim] if dim in fixed else sizes[dim][k]


def prepare(
    source: Path,
    record: ComponentRecord,
    model: onnx.ModelProto,
    scratch: Path,
    kept_in: Path | None = None,
) -> Path:
    """Write the lowered graph with weights that the parser can read; its file.

    kept_in: an engine that keeps both, for a plan without weights; otherwise they are in `scratch`.
    """
    folder = kept_in or scratch
    weights, stored = folder / record.weights, source / record.weights
    if codes.needed(model):
        codes.write(stored, weights, model)
    elif kept_in:
        place(stored, weights)
    else:
        os.symlink(stored.resolve(), weights)
    graph = folder / record.graph
    graph.write_bytes(model.SerializeToString())
    return graph


def build(name: str, job: Job, folder: Path) -> dict[str, Any]:
    """Run a job in a process of its own; its result.

    Raises BuildError with the builder's first words, or OutOfMemory.
    """
    file = folder / "job.json"
    file.write_text(json.dumps(asdict(job)))
    module = "edgevlm.engines.backends.tensorrt.worker"
    done = subprocess.run(
        [sys.executable, "-m", module, str(file)], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return dict(json.loads((folder / "result.json").read_text()))
    raise _failure(name, folder, done)


def _failure(name: str, folder: Path, done: subprocess.CompletedProcess[str]) -> ToolkitError:
    """Why a job failed, in the first words that the parser or the builder said."""
    result = folder / "result.json"
    errors = json.loads(result.read_text())["errors"] if result.exists() else []
    log = (folder / "build.log").read_text() if (folder / "build.log").exists() else ""
    errors += [line for line in log.splitlines() if line.startswith(("ERROR", "INTERNAL_ERROR"))]
    errors += done.stderr.splitlines()[-1:]
    first = errors[0] if errors else f"the builder ended with status {done.returncode}"
    if any(word in line for line in errors for word in _OUT_OF_MEMORY):
        raise OutOfMemory(
            f"{name}: the builder ran out of memory: {first[:300]}",
            hint="allow fewer image tiles or a shorter context: --max-image-tiles, --max-context",
        )
    hint = "please report this with edgevlm doctor"
    if "Cuda Runtime" in first:  # as with Q/DQ before TensorRT-RTX 1.5
        hint = "this release needs a graphics card to build this: take TensorRT-RTX 1.7"
    return BuildError(f"{name}: {first[:300]}", hint=hint)


def report(
    record: ComponentRecord, model: onnx.ModelProto, built: Built, seconds: float
) -> tuple[PlanReport, list[Kernel]]:
    """What the builder made of a component.

    Raises BuildError if the plan lacks its weights, or if a call has a body where a plugin was
    wanted.
    """
    result, given_bytes = built.result, _stored_bytes(model)
    made, memory = kernels.read(built.log), kernels.memory(built.log)
    stripped = bool(result["stripped"])  # what such a plan lacks is told when it is opened
    held = memory.weights if memory.weights is not None else int(result["plan_bytes"])
    if held < LEAST_WEIGHTS * given_bytes and not stripped:
        raise BuildError(
            f"{record.name}: the plan holds {held} of {given_bytes} bytes of weights: the builder "
            "took the model for a constant",
            hint="please report this with edgevlm doctor",
        )
    plugins.check_taken(record.name, model, int(result["plugins"]))
    rounded = products_in_8_bits(model)
    sites = [node.name for node in model.graph.node if node.op_type == "Attention"]
    return (
        PlanReport(
            layers=int(result["layers"]),
            kernels=len(made),
            attentions=len(sites),
            fused_attentions=kernels.attentions(made, sites, built.profiles),
            given_weights_bytes=given_bytes,
            held_weights_bytes=held,
            activations_bytes=memory.activations or 0,
            plan_bytes=int(result["plan_bytes"]),
            peak_rss_mb=float(result["peak_rss_mb"]),
            seconds=seconds,
            rounded=len(rounded),
            rounded_kernels=len(kernels.products(made, rounded, built.profiles)),
            profiles=built.profiles,
            rows=built.rows,
        ),
        made,
    )


def products_in_8_bits(model: onnx.ModelProto) -> dict[str, str]:
    """The products of a lowered graph whose inputs are rounded to 8 bits: the number format, as
    kernels name it, by the name of the node.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    kinds = {t.name: _FORMATS.get(t.data_type, "") for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        given = makers.get(node.input[0]) if node.op_type in ("MatMul", "Conv") else None
        if given is not None and given.op_type == "DequantizeLinear":
            rounding = makers.get(given.input[0])
            if rounding is not None and rounding.op_type == "QuantizeLinear":
                found[node.name] = kinds.get(rounding.input[2], "")
    return found


def _stored_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the weights that a graph reads from its file."""
    spans = [t.external_data for t in model.graph.initializer if t.data_location == t.EXTERNAL]
    return sum(int(item.value) for span in spans for item in span if item.key == "length")
