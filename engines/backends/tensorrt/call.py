"""Calls with one combination of shapes: their memory, and the CUDA graph that repeats them.

All inputs from the host lie in one block and all outputs to it in another, so that a call copies
once in and once out; a graph holds both copies and what runs between.
"""

from __future__ import annotations

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
        assert self._staging is not None
        ends = self.block.address, self._staging.address
        target, source = ends if to_card else ends[::-1]
        self._card.copy(target, source, self.nbytes, stream)


class Call:
    """Memory of calls with the same shapes.

    shapes: as the engine takes them. given: inputs that are on the card already. keeps: outputs
    stay there; each call makes memory for them. repeats: record a CUDA graph of the second call
    and launch that from then on.
    """

    def __init__(
        self,
        lane: Lane,
        context: Context,
        kinds: Mapping[str, str],
        shapes: Mapping[str, Shape],
        given: frozenset[str],
        outputs: tuple[str, ...],
        *,
        keeps: bool = False,
        repeats: bool = False,
    ) -> None:
        self._lane, self._context, self._kinds = lane, context, kinds
        self._shapes, self._keeps, self._repeats = shapes, keeps, repeats
        context.shape(shapes)
        self._made = {name: context.output(name) for name in outputs}
        staged = {name: shape for name, shape in shapes.items() if name not in given}
        self._inputs = Region(lane.card, kinds, staged, staged=True)
        self._outputs = None if keeps else Region(lane.card, kinds, self._made, staged=True)
        self._graph: Any = None
        self._recorded_at = self._calls = 0

    def run(self, inputs: Mapping[str, Tensor], states: Mapping[str, int]) -> dict[str, Tensor]:
        """Outputs by name. states: the addresses of the KV cache, by input and output."""
        for name, target in self._inputs.host().items():
            write(target, inputs[name], self._kinds[name])
        outputs = self._outputs or Region(
            self._lane.card, self._kinds, self._made, staged=not self._keeps
        )
        given = {n: a.pointer for n, a in inputs.items() if isinstance(a, DeviceArray)}
        self._context.shape(self._shapes)
        self._context.place(
            {**states, **self._inputs.addresses(), **outputs.addresses(), **given}, self._lane.arena
        )
        self._enqueue(outputs)
        self._lane.stream.sync()
        self._calls += 1
        if self._keeps:
            return dict(outputs.arrays())
        return {name: read(array, self._kinds[name]) for name, array in outputs.host().items()}

    def _enqueue(self, outputs: Region) -> None:
        """Run, from the second time on by a graph if TensorRT lets itself be recorded."""
        stream = self._lane.stream
        if self._graph is not None and self._recorded_at != self._context.changes:
            self._drop_graph()
        if self._repeats and self._graph is None and self._calls:
            self._record(outputs)
        if self._graph is not None:
            self._graph.launch(stream)
            return
        self._inputs.enqueue(stream, to_card=True)
        self._context.enqueue(stream)
        if not self._keeps:
            outputs.enqueue(stream, to_card=False)

    def _record(self, outputs: Region) -> None:
        """Record a graph; TensorRT has set itself up in the call before. If it cannot be, runs go
        on without one.
        """
        builder = self._lane.stream.create_graph_builder()
        try:
            builder.begin_building()
            try:
                if not self._context.capturable(builder.stream):
                    self._repeats = False
                self._inputs.enqueue(builder, to_card=True)
                self._context.enqueue(builder.stream)
                outputs.enqueue(builder, to_card=False)
            finally:
                builder.end_building()
            if self._repeats:
                self._graph = builder.complete()
                self._recorded_at = self._context.changes
        except Exception:  # cuda-core's errors are of one type; what matters fails without a graph
            self._repeats, self._graph = False, None
        finally:
            with suppress(Exception):
                builder.close()

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()
