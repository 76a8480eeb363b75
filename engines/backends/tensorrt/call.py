"""Calls with one combination of shapes: their memory, and the CUDA graph that repeats them.

All inputs from the host lie in one block and all outputs to it in another, so that a call copies
once in and once out; a graph holds both copies and what runs between.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edgevlm.engines.backends.tensorrt.arrays import (
    DeviceArray,
    Shape,
    as_array,
    read,
    size,
    write,
)
from edgevlm.engines.backends.tensorrt.card import Arena, Block, Card, aligned
from edgevlm.engines.backends.tensorrt.context import Context
from edgevlm.engines.backends.tensors import Tensor
from edgevlm.toolkit.ops.vocabulary import Array


@dataclass(frozen=True)
class Lane:
    """Where the calls of one component run: a card, a stream of it, memory for activations."""

    card: Card
    stream: Any
    arena: Arena


class Region:
    """Arrays one behind the other in memory of the card, `staged` in the host's too."""

    def __init__(
        self, card: Card, kinds: Mapping[str, str], shapes: Mapping[str, Shape], *, staged: bool
    ) -> None:
        self._offsets: dict[str, int] = {}
        self.nbytes = 0
        for name, shape in shapes.items():
            self._offsets[name] = self.nbytes
            self.nbytes += aligned(size(kinds[name], shape))
        self._card, self._kinds, self._shapes = card, kinds, shapes
        self.block = card.block(self.nbytes)
        self._staging: Block | None = card.staging(self.nbytes) if staged else None

    def addresses(self) -> dict[str, int]:
        """On the card, by name."""
        return {name: self.block.address + at for name, at in self._offsets.items()}

    def host(self) -> dict[str, Array]:
        """The arrays in the host's memory, as TensorRT stores them; valid as long as this is."""
        assert self._staging is not None
        memory = self._staging.host()
        return {
            name: as_array(memory, at, self._kinds[name], self._shapes[name])
            for name, at in self._offsets.items()
        }

    def arrays(self) -> dict[str, DeviceArray]:
        """The arrays on the card."""
        return {
            name: DeviceArray(self._card, self.block, self._kinds[name], self._shapes[name], at)
            for name, at in self._offsets.items()
        }

    def enqueue(self, stream: Any, *, to_card: bool) -> None:
        """Copy everything to the card, or to the host."""
        if not self.nbytes:  # all inputs are on the card already
            return
        assert self._staging is not None
        ends = self.block.address, self._staging.address
        target, source = ends if to_card else ends[::-1]
        self._card.copy(target, source, self.nbytes, stream)


class Call:
    """Memory of calls with the same shapes, on the same slots of a state.

    shapes: as the engine takes them. states: addresses of the KV cache, by input and output. given:
    inputs that are on the card already. keeps: outputs stay there; each call makes memory for them.
    repeats: record a CUDA graph in the second call, and launch that from then on; the context has
    to be this call's own.
    """

    def __init__(
        self,
        lane: Lane,
        context: Context,
        kinds: Mapping[str, str],
        shapes: Mapping[str, Shape],
        states: Mapping[str, int],
        given: frozenset[str],
        outputs: tuple[str, ...],
        *,
        keeps: bool = False,
        repeats: bool = False,
    ) -> None:
        self._lane, self._context, self._kinds = lane, context, kinds
        self._shapes, self._states, self._given = shapes, states, given
        self._keeps, self._repeats = keeps, repeats
        context.shape(shapes)
        self._made = {name: context.output(name) for name in outputs}
        staged = {n: shape for n, shape in shapes.items() if n not in given and n not in states}
        self._inputs = Region(lane.card, kinds, staged, staged=True)
        self._targets = self._inputs.host()
        self._outputs = None if keeps else self._region()
        self._graph: Any = None
        self._recorded_in: Block | None = None  # the arena of the graph, which is void in another
        self._calls = 0

    def _region(self) -> Region:
        """Memory for the outputs; for those that are kept, new for each call."""
        return Region(self._lane.card, self._kinds, self._made, staged=not self._keeps)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name."""
        for name, target in self._targets.items():
            write(target, inputs[name], self._kinds[name])
        outputs = self._outputs or self._region()
        if self._graph is None or self._recorded_in is not self._lane.arena.block:
            self._set_up(inputs, outputs)
        if self._graph is None:
            self._enqueue(outputs, self._lane.stream, self._lane.stream)
        else:
            self._graph.launch(self._lane.stream)
        self._lane.stream.sync()
        self._calls += 1
        if self._keeps:
            return dict(outputs.arrays())
        return {name: read(array, self._kinds[name]) for name, array in outputs.host().items()}

    def seconds(self, times: int) -> float:
        """Of one run on what `run` has copied last, without copies: the mean of many in a row."""
        start = time.perf_counter()
        for _ in range(times):
            self._context.enqueue(self._lane.stream)
        self._lane.stream.sync()
        return (time.perf_counter() - start) / times

    def _set_up(self, inputs: Mapping[str, Tensor], outputs: Region) -> None:
        """Tell the context where everything is, and record a graph if it is time."""
        given = {name: inputs[name].pointer for name in self._given}
        places = {**self._states, **given, **self._inputs.addresses(), **outputs.addresses()}
        self._context.shape(self._shapes)
        self._context.place(places, self._lane.arena)
        self._graph = None
        if self._repeats and self._calls:
            self._record(outputs)

    def _enqueue(self, outputs: Region, stream: Any, copies: Any) -> None:
        """Copy in, compute and copy out. copies: what cuda-core copies on, the same stream."""
        self._inputs.enqueue(copies, to_card=True)
        self._context.enqueue(stream)
        if not self._keeps:
            outputs.enqueue(copies, to_card=False)

    def _record(self, outputs: Region) -> None:
        """Record a graph; TensorRT has set itself up in the call before.

        If it cannot be recorded, calls go on without a graph.
        """
        if not self._context.capturable(self._lane.stream):
            self._repeats = False
            return
        builder = self._lane.stream.create_graph_builder()
        try:
            builder.begin_building()
            try:
                self._enqueue(outputs, builder.stream, builder)
            finally:
                builder.end_building()
            self._graph, self._recorded_in = builder.complete(), self._lane.arena.block
        except Exception:  # cuda-core's own; what is wrong with the call fails without a graph too
            self._repeats = False
        finally:
            with suppress(Exception):
                builder.close()
