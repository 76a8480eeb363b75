"""Find the first op that diverges: the lowered graph against the portable one, op by op.

Both graphs name their tensors alike, so the values after every op that both have can be compared.
Tensors are compared a few dozen at a time, so that memory stays that of a run. Nothing is written:
graphs are opened from memory, their weights from the files of the bundle or engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgevlm.engines.backends import sessions
from edgevlm.engines.backends.onnx_files import read_graph as _load
from edgevlm.engines.lowering.graph import op_name
from edgevlm.toolkit.bundle.goldens import AXES, Golden, relative_difference
from edgevlm.toolkit.bundle.manifest import Bundle, ComponentRecord
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.vlm.components import zero_states

_TENSORS_PER_RUN = 48
_PROCESSOR, _HALF = "CPUExecutionProvider", "tensor(float16)"


@dataclass(frozen=True)
class Divergence:
    """The first tensor beyond the tolerance, and the op that made it in the lowered graph."""

    tensor: str
    op: str
    difference: float


@dataclass(frozen=True)
class Graph:
    """A component's graph, and the folder with its weights. plain: run without ONNX Runtime's own
    rewriting. provider: who runs it, of ONNX Runtime.
    """

    model: onnx.ModelProto
    folder: Path
    plain: bool
    provider: Any = _PROCESSOR

    def values(self, names: Sequence[str], feed: Mapping[str, Array]) -> dict[str, Array]:
        """The named tensors of one call."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        options = sessions.read_weights_from(sessions.session_options(), self.folder)
        if self.plain:
            sessions.keep_graph(options)
        session = sessions.open_session(model.SerializeToString(), options, self.provider)
        halves = {value.name: value.type == _HALF for value in session.get_inputs()}
        given = {k: _fed(v, half=halves[k]) for k, v in feed.items() if k in halves}
        tensors = session.run(list(names), given)
        return dict(zip(names, tensors, strict=True))


def first_divergence(
    bundle: Bundle,
    record: ComponentRecord,
    folder: Path,
    calls: Sequence[Golden],
    tolerance: float,
    provider: Any = _PROCESSOR,
) -> Divergence | None:
    """Compare the engine's graph in `folder` with the bundle's on golden calls, in their order.

    provider: of ONNX Runtime, that runs the engine.

    tolerance: of the largest difference over the tensor's largest value. None if every tensor that
    both graphs have is within it: then the difference lies in an op that only the lowered graph
    has, or in the portable graph itself.
    """
    portable = Graph(_load(bundle.path / record.graph), bundle.path, plain=True)
    lowered = Graph(_load(folder / record.graph), folder, plain=False, provider=provider)
    updates = {port.name: port.updates for port in record.outputs if port.updates}
    states = zero_states(record.inputs, record.outputs, AXES)
    for golden in calls:
        feed = {**states, **golden.inputs}
        for divergence in _beyond(portable, lowered, feed, tolerance, skip=updates.keys()):
            return divergence
        if updates:
            updated = portable.values(list(updates), feed)
            states = {updates[name]: value for name, value in updated.items()}
    return None


def _fed(array: Array, *, half: bool) -> Array:
    """An input as a graph takes it: goldens and empty states are in float32."""
    return array.astype(np.float16) if half and array.dtype == np.float32 else array


def _beyond(
    portable: Graph,
    lowered: Graph,
    feed: Mapping[str, Array],
    tolerance: float,
    skip: Iterable[str],
) -> Iterator[Divergence]:
    """Tensors of one call that differ, in the order in which the lowered graph makes them.

    skip: the states, whose rows beyond the valid length are undefined.
    """
    makers = {out: op_name(n) for n in lowered.model.graph.node for out in n.output if out}
    shared = {out for n in portable.model.graph.node for out in n.output} - set(skip)
    names = [name for name in makers if name in shared]
    for start in range(0, len(names), _TENSORS_PER_RUN):
        group = names[start : start + _TENSORS_PER_RUN]
        expected, actual = portable.values(group, feed), lowered.values(group, feed)
        for name in group:
            if expected[name].dtype.kind != "f":
                continue
            difference = relative_difference(
                actual[name].astype(np.float32), expected[name].astype(np.float32)
            )
            if not difference <= tolerance:
                yield Divergence(name, makers[name], difference)
