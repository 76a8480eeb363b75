"""Find the first op that diverges in a plan of TensorRT: tensors become outputs, some at a time.

A plan shows its outputs alone, so the component is built again with further ones: first a few all
over the graph, then those between the last that is right and the first that is not. Each such build
fuses a little less than the engine's own, so what only fusing does may not be found.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import onnx

from edgevlm.engines.backends import Backend, Plugin, RunnerOptions, Shapes
from edgevlm.engines.backends.onnx_files import read_graph
from edgevlm.engines.build import shapes
from edgevlm.engines.build.bisect import Divergence, Graph
from edgevlm.engines.lowering.graph import op_name
from edgevlm.engines.lowering.lower import lower_component
from edgevlm.toolkit.bundle.goldens import AXES, Golden, relative_difference
from edgevlm.toolkit.bundle.manifest import Bundle, ComponentRecord
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import Target
from edgevlm.toolkit.vlm import towers
from edgevlm.toolkit.vlm.components import Port, zero_states

_MARKED = 24  # tensors that become outputs at a time
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


class Marking(Backend, Protocol):
    """A backend that can build a component with further tensors as outputs."""

    def marked(
        self,
        source: Path,
        record: ComponentRecord,
        model: onnx.ModelProto,
        folder: Path,
        target: Target,
        shapes: Shapes,
    ) -> ComponentRecord:
        """Build a lowered graph as it is into `folder`; the record to open it with."""
        ...


@dataclass(frozen=True)
class _Search:
    """What every round needs. model: lowered."""

    bundle: Bundle
    record: ComponentRecord
    backend: Marking
    target: Target
    model: onnx.ModelProto
    plugins: tuple[Plugin, ...]


def first_divergence(
    bundle: Bundle,
    record: ComponentRecord,
    backend: Marking,
    calls: Sequence[Golden],
    tolerance: float,
    plugins: tuple[Plugin, ...] = (),
) -> Divergence | None:
    """Compare a component with the bundle's graph on golden calls, tensor by tensor.

    tolerance: of the largest difference over the tensor's largest value. None if no tensor that
    both graphs have is beyond it.
    """
    target = backend.here()
    model, makers = shared(bundle, record, target, [plugin.op for plugin in plugins])
    names = list(makers)
    search = _Search(bundle, record, backend, target, model, plugins)
    first, end = 0, len(names)
    found: Divergence | None = None
    while first < end:
        chosen = sorted(
            {*np.linspace(first, end - 1, min(end - first, _MARKED)).round().astype(int)}
        )
        differences = _differences(search, [names[i] for i in chosen], calls)
        beyond = [i for i in chosen if not differences[names[i]] <= tolerance]
        if not beyond:
            return found
        name = names[beyond[0]]
        found = Divergence(name, makers[name], differences[name])
        if end - first == len(chosen):
            return found
        before = [i for i in chosen if i < beyond[0]]
        first, end = (before[-1] + 1 if before else first), beyond[0] + 1
    return found


def shared(
    bundle: Bundle, record: ComponentRecord, target: Target, plugins: Collection[str] = ()
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A component lowered for `target`, and its float tensors that the bundle's graph has too, each
    with the op that makes it, in order. States are none of them: rows beyond what is valid differ.
    """
    model = read_graph(bundle.path / record.graph)
    portable = {out for node in model.graph.node for out in node.output}
    portable -= {port.name for port in record.outputs if port.updates}
    lower_component(record.name, model, target, plugins)
    kinds = _kinds(model)
    makers = {out: op_name(node) for node in model.graph.node for out in node.output}
    return model, {n: op for n, op in makers.items() if n in portable and kinds.get(n) in _FLOATS}


def with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of a graph with further outputs."""
    copy, kinds = onnx.ModelProto(), _kinds(model)
    copy.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    for name in names:
        if name not in known:
            value = onnx.helper.make_tensor_value_info(name, kinds[name], None)
            copy.graph.output.append(value)
    return copy


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    """Types of a graph's tensors, as far as they follow from its inputs and weights."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.output]}


def _differences(
    search: _Search, names: Sequence[str], calls: Sequence[Golden]
) -> dict[str, float]:
    """The largest of each tensor over all calls, of the component built with them as outputs."""
    record, bundle = search.record, search.bundle
    model = with_outputs(search.model, names)
    added = [name for name in names if name not in {port.name for port in record.outputs}]
    sizes = shapes.of(record.name, bundle.model, towers.context_of(bundle.model))
    with TemporaryDirectory() as work:
        folder = Path(work)
        made = search.backend.marked(bundle.path, record, model, folder, search.target, sizes)
        ports = tuple(Port(name, "float", ("marked",)) for name in added)
        made = replace(made, outputs=(*record.outputs, *ports))
        options = RunnerOptions(context=AXES["context"], plugins=search.plugins)
        runner = search.backend.open(folder, made, bundle.manifest.model, options)
        try:
            state = runner.new_state()
            answers = [runner.run(golden.inputs, state) for golden in calls]
            kept = [{name: answer[name].copy() for name in names} for answer in answers]
        finally:
            runner.close()
    return _worst(_expected(search, names, calls), kept)


def _expected(
    search: _Search, names: Sequence[str], calls: Sequence[Golden]
) -> list[dict[str, Array]]:
    """The same tensors of the bundle's own graph, call after call."""
    record, folder = search.record, search.bundle.path
    graph = read_graph(folder / record.graph)
    portable = Graph(graph, folder, plain=True)
    updates = {port.name: port.updates for port in record.outputs if port.updates}
    states = zero_states(record.inputs, record.outputs, AXES)
    found = []
    for golden in calls:
        values = portable.values([*names, *updates], {**states, **golden.inputs})
        states = {past: values.pop(present) for present, past in updates.items()}
        found.append(values)
    return found


def _worst(
    expected: Sequence[Mapping[str, Array]], actual: Sequence[Mapping[str, Array]]
) -> dict[str, float]:
    """The largest difference of each tensor over all calls."""
    worst: dict[str, float] = {}
    for right, found in zip(expected, actual, strict=True):
        for name, value in right.items():
            floats = (x.astype(np.float32).reshape(-1) for x in (found[name], value))
            difference = relative_difference(*floats)
            worst[name] = max(
                worst.get(name, 0.0), difference if difference == difference else np.inf
            )
    return worst
