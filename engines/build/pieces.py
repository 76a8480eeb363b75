"""Run a compiled graph piece by piece, so that a component's weights need not be held at once.

The pieces are the engine's own graph with its own weights, cut where few values cross, between two
layers as a rule. Each is opened by itself, runs all calls in their order and is closed; what
crosses goes on to the next, and a KV cache stays with the piece that updates it. So answers are
those of the whole graph, but for what ONNX Runtime would have joined across a cut (an addition and
the norm behind it), which moves them by the rounding of a float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from edgevlm.engines.backends import sessions
from edgevlm.engines.runtime import memory
from edgevlm.toolkit.bundle.goldens import Golden
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import threads_here
from edgevlm.toolkit.vlm.components import zero_states


@dataclass(frozen=True)
class Piece:
    """Nodes that follow each other, and the names of what goes in and comes out, weights aside."""

    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def answers(
    folder: Path, record: ComponentRecord, calls: Sequence[Golden], context: int
) -> list[dict[str, Array]]:
    """The outputs of each call, states aside, of the compiled component in `folder`.

    context: positions of the KV cache. At most PIECE_BYTES of weights are held at a time, unless a
    single op reads more.
    """
    model = onnx.load(str(folder / record.graph), load_external_data=False)
    states = zero_states(record.inputs, record.outputs, {"batch": 1, "context": context})
    updated = {port.name: states[port.updates] for port in record.outputs if port.updates}
    plain = [port.name for port in record.outputs if not port.updates]
    known: list[dict[str, Array]] = [{**states, **golden.inputs} for golden in calls]
    ports = {value.name: value for value in model.graph.input}
    for piece in cut(model.graph, memory.PIECE_BYTES):
        session = _open(model, piece, ports, folder)
        for values in known:
            values |= _run(session, piece, values, updated)
        ports |= {port.name: _port(port, known[0][port.name]) for port in session.get_outputs()}
    return [{name: values[name] for name in plain} for values in known]


# -- cutting -------------------------------------------------------------------------------------


def cut(graph: onnx.GraphProto, most: int) -> list[Piece]:
    """The nodes of a graph in pieces that read at most so many bytes of weights each, if one node
    does not read more.
    """
    nodes, weights = list(graph.node), {t.name: _nbytes(t) for t in graph.initializer}
    bounds = [0, *_bounds(nodes, weights, most), len(nodes)]
    return [_piece(nodes, begin, end, weights, graph) for begin, end in pairwise(bounds)]


def _bounds(
    nodes: Sequence[onnx.NodeProto], weights: Mapping[str, int], most: int
) -> Iterator[int]:
    """Where pieces begin, but the first: of the places where the one before is at least half full,
    that which the fewest values cross, the last of several.
    """
    crossing = _crossing(nodes)
    begin = here = 0
    held, filled = set[str](), [0]  # filled: bytes of weights up to each node of this piece
    while here < len(nodes):
        new = {name for name in _reads(nodes[here]) if name in weights} - held
        size = filled[-1] + sum(weights[name] for name in new)
        if size <= most or here == begin:
            held, here = held | new, here + 1
            filled.append(size)
            continue
        places = [begin + i for i in range(1, len(filled)) if filled[i] >= filled[-1] / 2]
        begin = here = min(places, key=lambda place: (crossing[place], -place))
        held, filled = set(), [0]
        yield begin


def _crossing(nodes: Sequence[onnx.NodeProto]) -> list[int]:
    """How many values that a node made are read at or behind each place."""
    made = {name: i for i, node in enumerate(nodes) for name in node.output}
    last = {name: i for i, node in enumerate(nodes) for name in _reads(node) if name in made}
    change = np.zeros(len(nodes) + 1, np.int64)
    for name, until in last.items():
        change[made[name] + 1] += 1
        change[until + 1] -= 1
    return list(map(int, np.cumsum(change)))


def _piece(
    nodes: Sequence[onnx.NodeProto],
    begin: int,
    end: int,
    weights: Mapping[str, int],
    graph: onnx.GraphProto,
) -> Piece:
    own, rest = nodes[begin:end], nodes[end:]
    made = dict.fromkeys(name for node in own for name in node.output if name)
    wanted = {name for node in rest for name in _reads(node)} | {x.name for x in graph.output}
    known = {name for node in nodes[:begin] for name in node.output}
    known |= {value.name for value in graph.input}
    read = dict.fromkeys(name for node in own for name in _reads(node))
    inputs = tuple(name for name in read if name in known and name not in weights)
    return Piece(tuple(own), inputs, tuple(name for name in made if name in wanted))


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads; the graphs inside it, too."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _reads(inner)


def _nbytes(tensor: onnx.TensorProto) -> int:
    if tensor.data_location != tensor.EXTERNAL:
        return int(tensor.ByteSize())
    return next(int(item.value) for item in tensor.external_data if item.key == "length")


# -- running -------------------------------------------------------------------------------------


def _open(
    model: onnx.ModelProto, piece: Piece, ports: Mapping[str, onnx.ValueInfoProto], folder: Path
) -> Any:
    """A session of one piece, as the backend opens the whole."""
    read = {name for node in piece.nodes for name in _reads(node)}
    part = onnx.ModelProto()
    part.CopyFrom(model)
    part.graph.CopyFrom(
        helper.make_graph(
            piece.nodes,
            model.graph.name,
            [ports[name] for name in piece.inputs],
            [onnx.ValueInfoProto(name=name) for name in piece.outputs],
            [tensor for tensor in model.graph.initializer if tensor.name in read],
        )
    )
    options = sessions.session_options(threads_here())
    return sessions.open_session(
        part.SerializeToString(), sessions.read_weights_from(options, folder)
    )


def _port(port: Any, value: Array) -> onnx.ValueInfoProto:
    """What a session says of an output, as an input of the piece that reads it."""
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    return helper.make_tensor_value_info(port.name, kind, port.shape)


def _run(
    session: Any, piece: Piece, values: Mapping[str, Array], updated: Mapping[str, Array]
) -> dict[str, Array]:
    """What comes out of a piece; `updated`: the arrays in which its states lie, by output."""
    binding = session.io_binding()
    for name in piece.inputs:
        _bind(binding.bind_input, name, values[name])
    for name in piece.outputs:
        if name in updated:
            _bind(binding.bind_output, name, updated[name])
        else:
            binding.bind_output(name)
    session.run_with_iobinding(binding)
    found = zip(piece.outputs, binding.get_outputs(), strict=True)
    return {name: updated[name] if name in updated else x.numpy() for name, x in found}


def _bind(bind: Any, name: str, array: Array) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
