"""Runs plans of TensorRT and TensorRT-RTX with cuda-core and NumPy alone.

A component has a context for each profile, and one for each CUDA graph of single tokens. Its
outputs are copied to the host, or kept on the card for the component that reads them. States lie
on the card at fixed addresses. Where the release cannot update a cache in place (before 10.15) a
state is two buffers, and every call of a slot reads the one that the call before wrote. Several
slots decode in one call as far as a profile takes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from edgevlm.engines.backends import LayerTime, RunnerOptions
from edgevlm.engines.backends.bindings import Bindings
from edgevlm.engines.backends.state import Allocation, State, check
from edgevlm.engines.backends.tensorrt import jit, kernels, plan, refit
from edgevlm.engines.backends.tensorrt.arrays import ROW_AXES, DeviceArray, Shape, size
from edgevlm.engines.backends.tensorrt.call import Call, Lane
from edgevlm.engines.backends.tensorrt.card import Arena, Card, Cards, aligned
from edgevlm.engines.backends.tensorrt.context import Context, Times
from edgevlm.engines.backends.tensorrt.plan import Plan
from edgevlm.engines.backends.tensors import Tensor, join
from edgevlm.engines.lowering import capabilities
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import Target
from edgevlm.toolkit.vlm.components import Port


class Slots(Allocation):
    """A state's memory. latest: for each slot 0 if what it holds is in the buffers of the inputs,
    1 if in those of the outputs, which only states of two buffers have.
    """

    def __init__(self, slots: int) -> None:
        self.latest = [0] * slots

    def exchanged(self, a: int, b: int) -> None:
        """Both buffers were."""
        self.latest[a], self.latest[b] = self.latest[b], self.latest[a]

    def copied(self, source: int, target: int) -> None:
        """Both buffers were."""
        self.latest[target] = self.latest[source]


def open_runner(
    cards: Cards,
    trt: Any,
    folder: Path,
    record: ComponentRecord,
    options: RunnerOptions,
    target: Target,
) -> TensorRTRunner:
    """Load one component onto the card that `cards` lends.

    target: this machine. Raises TargetMismatch, OutOfMemory, BuildError or MissingExtra, and then
    holds nothing.
    """
    with ExitStack() as stack:
        card = stack.enter_context(cards.lent())
        file = folder / record.graph
        compiled = jit.file_of(file, f"{trt.__version__} {target}")
        made = plan.read(trt, file, compiled, refit.graph_of(folder, record))
        if made.config is not None:
            stack.callback(jit.keep, made.config, compiled)
        stream = card.stream()
        stack.callback(stream.close)
        arena = Arena(card) if options.beside else card.arena
        arena.reserve(made.activations_bytes)
        times = None
        if options.profile:
            listing = folder / f"{record.name}.kernels.json"
            times = Times(trt, kernels.kinds(json.loads(listing.read_text())))
        # opset 24 brought TensorScatter, which updates the cache where it is
        in_place = capabilities.of(target).opset >= 24
        runner = TensorRTRunner(made, record, Lane(card, stream, arena), times, in_place=in_place)
        runner.opened = stack.pop_all()
    return runner


class TensorRTRunner:
    """An opened engine with its contexts and memory. opened: closes what it stands on."""

    def __init__(
        self,
        made: Plan,
        record: ComponentRecord,
        lane: Lane,
        times: Times | None,
        *,
        in_place: bool,
    ) -> None:
        self.opened = ExitStack()
        self._made: Plan | None = made
        self._record, self._lane, self._times, self._in_place = record, lane, times, in_place
        self._updates = {port.name: port.updates for port in record.outputs if port.updates}
        past = set(self._updates.values())
        self._plain = [port for port in record.inputs if port.name not in past]
        self._results = [port for port in record.outputs if not port.updates]
        self._row_axis = _row_axis(self._plain, self._results)
        self._tokens = next((p.name for p in self._plain if "sequence" in p.shape), None)
        self._contexts: dict[int, Context] = {}
        self._bindings: WeakKeyDictionary[Allocation, Bindings[Call]] = WeakKeyDictionary()
        self._stateless = State({}, 1, Slots(1))

    def new_state(self, slots: int = 1) -> State:
        """On the card, in the engine's own format and length."""
        if slots < 1:
            raise InputError(f"a state of {slots} slots holds nothing")
        if not self._updates:
            return State({}, slots, Slots(slots))
        held = {past: past for past in self._updates.values()}
        if not self._in_place:
            held |= self._updates
        kinds, limits = self._plan.kinds, self._plan.profiles[0]
        rows = {name: limits[past][1][1:] for name, past in held.items()}
        strides = {name: aligned(size(kinds[name], row)) for name, row in rows.items()}
        card = self._card()
        block, at = card.block(slots * sum(strides.values()), zeros=True), 0
        arrays: dict[str, Any] = {}
        for name, row in rows.items():
            stride = strides[name]
            arrays[name] = DeviceArray(card, block, kinds[name], (slots, *row), at, stride)
            at += slots * stride
        return State(arrays, slots, Slots(slots))

    # -- calls -----------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Tensor], state: State | None = None) -> dict[str, Array]:
        """As Runner says; inputs may be on the card already."""
        return self._in_rows(inputs, state, keeps=False)

    def keep(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs as DeviceArrays, in memory of their own."""
        return self._in_rows(inputs, None, keeps=True)

    def _in_rows(
        self, inputs: Mapping[str, Tensor], state: State | None, *, keeps: bool
    ) -> dict[str, Tensor]:
        """In as few calls as profiles take so many rows in: one, or row by row, or between."""
        axis, rows = self._row_axis, 1
        if axis is not None:
            rows = next(inputs[p.name].shape[0] for p in self._plain if p.shape[0] == axis)
        if self._updates:
            state = check(state, list(self._updates.values()), rows, self._record.name)
        state = state or self._stateless
        if rows <= 1 or (rows <= self._most_rows and self._together(inputs, state)):
            return self._call(inputs, state, keeps)
        parts: list[dict[str, Tensor]] = []
        begin = 0
        while begin < rows:
            end = min(begin + self._most_rows, rows)
            if not self._together(*self._part(inputs, state, begin, end)):
                end = begin + 1
            parts.append(self._call(*self._part(inputs, state, begin, end), keeps))
            begin = end
        return {name: join([part[name] for part in parts]) for name in parts[0]}

    def _part(
        self, inputs: Mapping[str, Tensor], state: State, begin: int, end: int
    ) -> tuple[Mapping[str, Tensor], State]:
        """Some rows of a call, and their slots."""
        axis = self._row_axis
        cut = {port.name for port in self._plain if port.shape[0] == axis}
        some = {n: array[begin:end] if n in cut else array for n, array in inputs.items()}
        return some, state.slots(begin, end) if self._updates else state

    def _together(self, inputs: Mapping[str, Tensor], state: State) -> bool:
        """Whether one call takes these rows: a profile does, and their slots lie side by side, as
        the rows of one tensor.
        """
        arrays: Iterable[Any] = state.arrays.values()
        fits = not self._updates or all(array.contiguous for array in arrays)
        return fits and self._profile(inputs, state) is not None

    @property
    def _most_rows(self) -> int:
        """The most rows that any profile takes in one call."""
        leading = [port.name for port in self._plain if port.shape[0] == self._row_axis]
        return max(limits[name][1][0] for limits in self._plan.profiles for name in leading[:1])

    def _profile(self, inputs: Mapping[str, Tensor], state: State) -> int | None:
        """The profile that a call runs in, None where none takes its shapes."""
        return self._plan.profile(self._shapes(inputs, state))

    def _shapes(self, inputs: Mapping[str, Tensor], state: State) -> dict[str, Shape]:
        """Of all inputs of the engine, its caches among them."""
        shapes = {port.name: tuple(inputs[port.name].shape) for port in self._plain}
        return shapes | {past: state.arrays[past].shape for past in self._updates.values()}

    def seconds(self, inputs: Mapping[str, Tensor], times: int) -> float:
        """Of one call without a state and without copies: the mean of `times` back to back."""
        call, inputs = self._bound(inputs, self._stateless, keeps=False)
        call.run(inputs)
        return call.seconds(times)

    def _call(self, inputs: Mapping[str, Tensor], state: State, keeps: bool) -> dict[str, Tensor]:
        twice = bool(self._updates) and not self._in_place
        if twice:
            self._gather(state)
        call, inputs = self._bound(inputs, state, keeps=keeps)
        outputs = call.run(inputs)
        if twice:
            latest, read = _slots(state).latest, _slots(state).latest[state.first]
            latest[state.first : state.first + state.count] = [1 - read] * state.count
        return self._cut(outputs, inputs)

    def _gather(self, state: State) -> None:
        """Have what all slots of a state hold in the same one of its two buffers.

        They change places together, so that copies are due only when a slot joins the others.
        """
        latest, slots = _slots(state).latest, range(state.first, state.first + state.count)
        wanted = int(2 * sum(latest[slot] for slot in slots) > state.count)
        for slot in (slot for slot in slots if latest[slot] != wanted):
            own = state.slot(slot - state.first).arrays
            for present, past in self._updates.items():
                ends = own[present], own[past]
                target, source = ends if wanted else ends[::-1]
                self._card().copy(target.pointer, source.pointer, source.nbytes)
            latest[slot] = wanted

    def _bound(
        self, inputs: Mapping[str, Tensor], state: State, *, keeps: bool
    ) -> tuple[Call, Mapping[str, Tensor]]:
        """The memory of such a call, and its inputs as it takes them."""
        self._card()
        kinds = self._plan.kinds
        inputs = {port.name: _of_kind(inputs[port.name], kinds[port.name]) for port in self._plain}
        given = frozenset(n for n, array in inputs.items() if isinstance(array, DeviceArray))
        decode = self._tokens is not None and inputs[self._tokens].shape[1] == 1
        shapes = tuple(array.shape for array in inputs.values())
        key = given, keeps, shapes, state.first, state.count, _slots(state).latest[state.first]
        bindings = self._bindings.get(state.allocation)
        if bindings is None:
            bindings = self._bindings[state.allocation] = Bindings()
        call = bindings.get(
            key, lambda: self._bind(inputs, state, given, keeps, decode), decode=decode
        )
        return call, inputs

    def _bind(
        self,
        inputs: Mapping[str, Tensor],
        state: State,
        given: frozenset[str],
        keeps: bool,
        decode: bool,
    ) -> Call:
        """Memory and a context for calls with these shapes and slots.

        Raises InputError where no profile takes them, OutOfMemory, or BuildError.
        """
        shapes, profile = self._shapes(inputs, state), self._profile(inputs, state)
        if profile is None:
            asked = ", ".join(f"{n} {list(inputs[n].shape)}" for n in (p.name for p in self._plain))
            raise InputError(
                f"{self._record.name} was not built for calls of this size: {asked}",
                hint="build with a larger --max-context or --max-image-tiles",
            )
        repeats = decode and not given and self._times is None
        least = {name: ends[0] for name, ends in self._plan.profiles[profile].items()}
        return Call(
            self._lane,
            self._new_context(profile) if repeats else self._context(profile),
            self._plan.kinds,
            {name: _filled(shape, least[name]) for name, shape in shapes.items()},
            self._states(state),
            given,
            tuple(port.name for port in self._results),
            keeps=keeps,
            repeats=repeats,
        )

    def _context(self, profile: int) -> Context:
        """That of all calls which no graph repeats."""
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        return self._contexts[profile]

    def _new_context(self, profile: int) -> Context:
        """One of its own: a graph is void once the context that it was captured from changes."""
        profiler = self._times.profiler if self._times else None
        return Context(self._plan, profile, self._lane.stream, profiler)

    def _states(self, state: State) -> dict[str, int]:
        """Where the engine reads the cache and where it writes it, by input and output."""
        addresses: dict[str, int] = {}
        for present, past in self._updates.items():
            here: Any = state.arrays[past]
            ends = here.pointer, here.pointer
            if not self._in_place:
                there: Any = state.arrays[present]
                ends = here.pointer, there.pointer
                if _slots(state).latest[state.first]:
                    ends = ends[::-1]
            addresses[past], addresses[present] = ends
        return addresses

    def _cut(self, outputs: dict[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs without what was computed for an axis that the caller left empty."""
        empty = {
            dim
            for port in self._plain
            for dim, size in zip(port.shape, inputs[port.name].shape, strict=True)
            if isinstance(dim, str) and not size
        }
        if not empty:
            return outputs
        return {
            port.name: outputs[port.name][
                tuple(slice(0) if dim in empty else slice(None) for dim in port.shape)
            ]
            for port in self._results
        }

    # -- the rest --------------------------------------------------------------------------

    @property
    def _plan(self) -> Plan:
        if self._made is None:
            raise InputError(f"{self._record.name} is closed")
        return self._made

    @property
    def refit_ms(self) -> float:
        """What putting weights into a plan without them took; 0 for any other."""
        return self._plan.refit_ms

    def _card(self) -> Card:
        self._lane.card.use()
        return self._lane.card

    def layers(self) -> list[LayerTime]:
        """Milliseconds by kernel, slowest first, as TensorRT's profiler reports them."""
        return self._times.layers() if self._times else []

    def close(self) -> None:
        """Free the engine and all memory of its calls; states are freed with the session."""
        self._bindings.clear()
        self._contexts.clear()
        self._made = None
        self.opened.close()


def _slots(state: State) -> Slots:
    assert isinstance(state.allocation, Slots)
    return state.allocation


def _row_axis(inputs: list[Port], outputs: list[Port]) -> str | None:
    """The axis that leads all outputs and some input, if its rows do not depend on one another."""
    leading = {port.shape[0] for port in outputs}
    axis = leading.pop() if len(leading) == 1 else None
    if axis in ROW_AXES and any(port.shape[0] == axis for port in inputs):
        return str(axis)
    return None


def _of_kind(array: Tensor, kind: str) -> Tensor:
    """An input, on the host if the engine reads another format than it is stored in."""
    return array.numpy() if isinstance(array, DeviceArray) and array.kind != kind else array


def _filled(shape: Shape, least: Shape) -> Shape:
    """A shape whose empty axes are as long as the profile needs them."""
    return tuple(n or low for n, low in zip(shape, least, strict=True))
