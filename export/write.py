"""From a model and its weights to a bundle on disk, holding one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.shape_inference
from onnx import helper

from edgevlm.export.functions import FUNCTIONS
from edgevlm.export.nodes import DOMAIN, ELEMENT, IR_VERSION, OPSET, VERSION
from edgevlm.export.record import OnnxOps
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle import manifest as bundles
from edgevlm.toolkit.bundle.atomic import require_space, writing
from edgevlm.toolkit.bundle.goldens import Golden
from edgevlm.toolkit.bundle.manifest import ComponentRecord, FileRecord, Manifest, Tensors
from edgevlm.toolkit.checkpoints.layouts.source import AnySource, Source
from edgevlm.toolkit.checkpoints.safetensors_io import (
    STORAGE,
    Blocks,
    Entry,
    TensorSpec,
    Written,
    row_blocks,
    write_safetensors,
)
from edgevlm.toolkit.checkpoints.weights import RandomWeights
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.quantization import blockwise, channels
from edgevlm.toolkit.quantization.blockwise import StorageFormat
from edgevlm.toolkit.quantization.coded import Offers
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.vlm import components, towers
from edgevlm.toolkit.vlm.components import Component, Port
from edgevlm.toolkit.vlm.cost import count

Progress = Callable[[str], None]
PROMPT_FORM = ".prompt"  # in the names of the files of a second language model


def write_bundle(
    source: AnySource,
    out: Path,
    *,
    made_by: str,
    progress: Progress,
    dtype: str = "fp32",
    force: bool = False,
) -> None:
    """Write the bundle `out` in one step: whole or not at all.

    dtype: fp32, fp16 or bf16, of weights that the source's plan leaves in float.
    """
    every = components.components(source.model)
    _write(source, out, every, "", made_by=made_by, progress=progress, dtype=dtype, force=force)


def write_prompt_form(source: Source, out: Path, *, made_by: str, progress: Progress) -> None:
    """Write the language model alone, as `write_bundle` does but under the names of PROMPT_FORM:
    for an engine that has it in two precisions. No bundle to keep: the other components lack.
    """
    lm = components.language_model(source.model)
    _write(source, out, (lm,), PROMPT_FORM, made_by=made_by, progress=progress)


def _write(
    source: AnySource,
    out: Path,
    model_components: tuple[Component, ...],
    suffix: str,
    *,
    made_by: str,
    progress: Progress,
    dtype: str = "fp32",
    force: bool = False,
) -> None:
    """The bundle of some components, whose files have `suffix` in their names."""
    recordings = [record(component, dtype, source.plan) for component in model_components]
    functions = set[str]().union(*(recorded.ops.functions for recorded in recordings))
    require_space(out, sum(recorded.nbytes() for recorded in recordings))
    files: dict[str, FileRecord] = {}
    with writing(out, force=force) as folder:
        records = []
        for recorded in recordings:
            progress(f"{recorded.component.name}: writing graph and weights")
            records.append(_write_component(folder, recorded, suffix, source, files))
        _write_tokenizer_and_goldens(folder, recordings, suffix, source, files, progress)
        manifest = Manifest(
            bundles.FORMAT,
            made_by,
            source.origin,
            towers.to_json(source.model),
            dtype,
            OPSET,
            tuple(records),
            components.edges(source.model),
            dict.fromkeys(sorted(functions), VERSION),
            files,
            source.plan,
        )
        bundles.write_manifest(folder, manifest)


def _write_component(
    folder: Path, recorded: Recorded, suffix: str, source: AnySource, files: dict[str, FileRecord]
) -> ComponentRecord:
    component = recorded.component
    graph, weights = (f"{component.name}{suffix}.{kind}" for kind in ("onnx", "safetensors"))
    values = source.weights.get(component.name, {})
    written = write_graph(folder, recorded, graph, weights, values)
    files[weights] = FileRecord(written.nbytes, written.sha256)
    files[graph] = bundles.record_file(folder / graph)
    return describe(component, graph, weights)


def write_graph(
    folder: Path, recorded: Recorded, graph: str, weights: str, values: Mapping[str, Array]
) -> Written:
    """Write a component's weights and its graph under these names, and check the graph."""
    written = _write_weights(folder / weights, recorded, values)
    model = recorded.model(weights, written)
    (folder / graph).write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(folder / graph), full_check=True)
    check_shapes(model)
    return written


def check_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its shapes inferred. Raises InferenceError where two do not fit.

    Follows the shapes that function bodies compute from their attributes, which the checker's
    own inference does not.
    """
    return onnx.shape_inference.infer_shapes(
        model, check_type=True, strict_mode=True, data_prop=True
    )


@dataclass(frozen=True)
class Recorded:
    """A recorded component: nodes and tables, and which of its parameters they use."""

    component: Component
    ops: OnnxOps
    outputs: dict[str, str]
    dtype: str

    def planned(self) -> list[TensorSpec]:
        """Every tensor of the weights file."""
        stored, used = self.ops.quantized, list[TensorSpec]()
        for name, shape in self.component.shapes.items():
            if name in stored.formats:
                used += stored.planned(name, self.dtype)
            else:
                plain = [TensorSpec(name, self.dtype, shape)]
                found = self.ops.channels.planned(name, self.dtype)
                used += found or self.ops.static.planned(name, self.dtype) or plain
        return used + [TensorSpec(n, "fp32", x.shape) for n, x in self.ops.constants.items()]

    def nbytes(self) -> int:
        """Size of the weights file, its header aside."""
        return sum(math.prod(t.shape) * STORAGE[t.dtype].itemsize for t in self.planned())

    def model(self, location: str, written: Written) -> onnx.ModelProto:
        """The ONNX model whose weights are in the file `location`."""
        initializers = list(self.ops.small.values())
        for name, entry in written.entries.items():
            kind, dims = self.ops.quantized.declared(name) or (ELEMENT[entry.dtype], entry.shape)
            tensor = onnx.TensorProto(name=name, dims=dims, data_type=kind)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            span = {"location": location, "offset": entry.offset, "length": entry.nbytes}
            for key, value in span.items():
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
        self._name_outputs()
        graph = helper.make_graph(
            self.ops.nodes,
            self.component.name,
            [_value(port, self.dtype) for port in self.component.inputs],
            [_value(port, self.dtype) for port in self.component.outputs],
            initializers,
        )
        functions = [FUNCTIONS[name] for name in sorted(self.ops.functions)]
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
        return helper.make_model(
            graph,
            functions=functions,
            opset_imports=opsets if functions else opsets[:1],
            ir_version=IR_VERSION,
            producer_name="edgevlm",
        )

    def _name_outputs(self) -> None:
        """Give the tensors that leave the graph the names of their ports."""
        renamed = {tensor: port for port, tensor in self.outputs.items()}
        for node in self.ops.nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]


class Parameters(Mapping[str, str]):
    """Tensor keys as graph names; remembers which were used."""

    def __init__(self, keys: Mapping[str, tuple[int, ...]]) -> None:
        self._keys = keys
        self.used: dict[str, None] = {}

    def __getitem__(self, key: str) -> str:
        if key not in self._keys:
            raise KeyError(key)
        self.used[key] = None
        return key

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def record(component: Component, dtype: str, plan: PrecisionPlan | None = None) -> Recorded:
    """Run the component's function over the recorder."""
    ops, parameters = (
        OnnxOps(component.name, dtype, component.shapes, plan),
        Parameters(component.shapes),
    )
    inputs = {port.name: port.name for port in component.inputs}
    outputs = component.forward(ops, Weights(parameters), inputs)
    idle = set(component.shapes) - set(parameters.used)
    if idle:
        raise AssertionError(f"{component.name} declares tensors it never uses: {sorted(idle)[:3]}")
    return Recorded(component, ops, outputs, dtype)


def graphs(source: AnySource, dtype: str = "fp32") -> dict[str, onnx.ModelProto]:
    """The graphs of all components, whose weights are in no file: enough to lower them."""
    recordings = (record(c, dtype, source.plan) for c in components.components(source.model))
    return {r.component.name: r.model("", _unwritten(r)) for r in recordings}


def _unwritten(recorded: Recorded) -> Written:
    """Types and shapes of the weights that a graph reads."""
    entries = {t.name: Entry(t.dtype, t.shape, 0) for t in recorded.planned()}
    return Written(entries, "", 0)


def _value(port: Port, dtype: str) -> onnx.ValueInfoProto:
    kind = ELEMENT[dtype if port.dtype == "float" else port.dtype]
    return helper.make_tensor_value_info(port.name, kind, list(port.shape))


def _write_weights(path: Path, recorded: Recorded, weights: Mapping[str, Array]) -> Written:
    tables = recorded.ops.constants
    formats = {
        name + storage.suffix: (name, storage)
        for name, storage in recorded.ops.quantized.formats.items()
    }
    by_channel = recorded.ops.channels.used

    def produce(tensor: TensorSpec) -> Blocks:
        if tensor.name in tables:
            return row_blocks(tables[tensor.name])
        static = recorded.ops.static.content(tensor.name, weights)
        if static is not None:
            return static
        stored, tail = _split(tensor.name)
        if stored in by_channel:
            weight = weights[by_channel[stored]]
            steps = channels.scales(weight)
            return iter([steps]) if stored != tensor.name else channels.codes(weight, steps)
        quantized = formats.get(stored)
        if quantized is not None:
            return _quantized(weights, *quantized, tail)
        if isinstance(weights, RandomWeights):
            return weights.blocks(tensor.name)
        return row_blocks(weights[tensor.name])

    return write_safetensors(path, recorded.planned(), produce)


def _split(name: str) -> tuple[str, str]:
    """A stored tensor's name without the tail that says which part of a weight it is; the tail."""
    tail = next((tail for tail in blockwise.TAILS if name.endswith(tail)), "")
    return name.removesuffix(tail), tail


def _quantized(
    weights: Mapping[str, Array], name: str, storage: StorageFormat, tail: str
) -> Blocks:
    """A part of a weight, by its tail: that of known codes, or of rounding to nearest."""
    known = weights.codes(name) if isinstance(weights, Offers) else None
    if known is not None and known.fit(storage):
        return row_blocks(known.part(tail))
    rows = weights[name].T if storage.transposed else weights[name]
    block = storage.block_in(rows.shape[1])
    if tail == blockwise.ORDER:
        return iter([np.arange(rows.shape[1])])
    if tail == blockwise.ZERO_POINTS:
        return iter([blockwise.fixed_zero_points(rows.shape, storage)])
    return blockwise.pieces(rows, storage.bits, block, scales=tail == blockwise.SCALE)


def describe(component: Component, graph: str, weights: str) -> ComponentRecord:
    """The manifest's record of a component; flops for one image or one token."""
    at = {**goldens.AXES, "sequence": 1, "rows": 1, "context": 1}
    params = sum(math.prod(shape) for shape in component.shapes.values())
    return ComponentRecord(
        component.name,
        graph,
        weights,
        component.inputs,
        component.outputs,
        params,
        count(component, at).flops,
        at,
    )


def _write_tokenizer_and_goldens(
    folder: Path,
    recordings: list[Recorded],
    suffix: str,
    source: AnySource,
    files: dict[str, FileRecord],
    progress: Progress,
) -> None:
    written = [bundles.GOLDENS]
    if isinstance(source, Source):
        (folder / bundles.TOKENIZER).write_text(source.tokenizer, encoding="utf-8")
        written.insert(0, bundles.TOKENIZER)
    answered: list[Golden] = []
    with np.errstate(over="ignore"):
        for component in (recorded.component for recorded in recordings):
            progress(f"{component.name}: running the reference for its goldens")
            weights = folder / f"{component.name}{suffix}.safetensors"
            answered += _goldens(component, Tensors(weights), source)
    goldens.save(folder / bundles.GOLDENS, answered)
    for name in written:
        files[name] = bundles.record_file(folder / name)


def _goldens(component: Component, stored: Tensors, source: AnySource) -> list[Golden]:
    """The answers of the weights as they were stored, and the float model's where those differ."""
    known = goldens.load(source.goldens) if source.goldens else []
    parts = component.name, component.inputs, component.outputs
    origin = goldens.calls_of(known, *parts) if known else []
    if not source.plan.precisions and not any(golden.float_outputs for golden in origin):
        return list(goldens.make_goldens(component, stored))
    floats = origin or goldens.make_goldens(component, source.weights.get(component.name, {}))
    return list(goldens.requantized(component, stored, floats))
