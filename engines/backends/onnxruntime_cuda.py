"""ONNX Runtime on an NVIDIA card: graphs as on the processor, memory on the card.

A KV state lives on the card and is bound as input and as output. The inputs of a call are copied
into buffers bound once, unless they hold the same already; outputs come back as float32. A decode
step is one CUDA graph for each number of slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, finalize, ref

import numpy as np

from edgevlm.engines.backends import (
    Compiled,
    LayerTime,
    Peaks,
    RunnerOptions,
    Shapes,
    cuda_probes,
    cuda_sessions,
    device_array,
    onnx_files,
)
from edgevlm.engines.backends.bindings import Bindings
from edgevlm.engines.backends.device_array import Device, DeviceArray
from edgevlm.engines.backends.state import Allocation, State, check
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.checkpoints.safetensors_io import BLOCK_BYTES, Blocks, SafetensorsFile
from edgevlm.toolkit.errors import InputError, TargetMismatch, ToolkitError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import channels
from edgevlm.toolkit.target import CUDA_PACKAGE, Target, card, this_card
from edgevlm.toolkit.vlm.components import Port

if TYPE_CHECKING:
    import onnx

PROVIDER = cuda_sessions.CUDA
_HALVES = {"tensor(float)": "fp32", "tensor(float16)": "fp16", "tensor(bfloat16)": "bf16"}
_IN_FP32 = "attention over the KV cache has no kernel in fp32: export --dtype fp16 is faster"
_COMPARED_BYTES = 1 << 16  # inputs that are compared with the last ones before they are copied


def here() -> Target:
    """ONNX Runtime on this machine's card."""
    return this_card()


# -- build -----------------------------------------------------------------------------------


def check_builds(target: Target) -> bool:
    """Never: what is compiled is compared with the reference at once, on a card.

    Raises TargetMismatch where there is none, or no package for it.
    """
    where, missing = here(), []
    if not where.version:
        missing.append(f"{CUDA_PACKAGE} is not installed (pip install 'edgevlm[gpu]')")
    if where.arch == card.NO_DEVICE:
        missing.append("there is no NVIDIA card, or no driver")
    if missing:
        raise TargetMismatch(
            f"an engine for {target} cannot be built on this machine: {'; '.join(missing)}",
            hint="run the same command on the machine that has the card; with --explain it shows "
            "the lowering here",
        )
    return False


def compile(
    source: Path,
    dtype: str,
    record: ComponentRecord,
    folder: Path,
    target: Target,
    shapes: Shapes,
) -> Compiled:
    """Lower one component; weights are linked unless some are stored by channel."""
    model = onnx_files.read_graph(source / record.graph, source / record.weights)
    from edgevlm.engines.lowering import float_ports, lower
    from edgevlm.engines.lowering.onnxruntime_cuda_lint import float_nodes

    lowered = lower.lower_component(record.name, model, target)
    updates = {port.name: port.updates for port in record.outputs if port.updates}
    float_ports.widen(model, {*updates, *updates.values()})
    floats = "\n".join(float_nodes(model))
    model.metadata_props.add(key=cuda_sessions.FLOATS, value=floats)
    changes = _by_output(source / record.weights, model)
    onnx_files.write(source, folder, record, model, changes)
    return Compiled(
        record,
        (record.graph, record.weights),
        "int8_rows" if changes else dtype,  # the reference rounds inputs, which stay here
        (_IN_FP32,) if dtype == "fp32" and updates else (),
        lowered.decisions,
        provider=(PROVIDER.name, dict(PROVIDER.options)),
    )


def _by_output(weights: Path, model: onnx.ModelProto) -> dict[str, onnx_files.Change]:
    """Weights that are stored by channel [inputs, outputs], as MatMulNBits takes them."""
    from edgevlm.engines.lowering.onnxruntime_cuda_rewrites import BY_OUTPUT

    stored = onnx_files.stored(SafetensorsFile(weights), model)
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer if t.name in stored}
    changes = dict[str, onnx_files.Change]()
    for tensor, shape in shapes.items():
        if tensor.endswith(BY_OUTPUT):
            name, entry = stored[tensor]
            blocks = _turned if name.endswith(channels.SUFFIX) else _repeated
            changes[name] = onnx_files.Change(entry.dtype, shape, _made(blocks, shape))
    return changes


def _made(blocks: Any, shape: tuple[int, ...]) -> Any:
    return lambda array: blocks(array, shape)


def _turned(codes: Array, shape: tuple[int, ...]) -> Blocks:
    """[inputs, outputs] as [outputs, blocks, block]; what fills the last block counts nothing."""
    inputs, outputs = codes.shape
    width = shape[1] * shape[2]
    step = max(BLOCK_BYTES // width, 1)
    for start in range(0, outputs, step):
        part = codes[:, start : start + step].T
        whole = np.full((len(part), width), channels.ZERO_POINT, np.uint8)
        whole[:, :inputs] = part
        yield whole.reshape(-1, *shape[1:])


def _repeated(scales: Array, shape: tuple[int, ...]) -> Blocks:
    """[outputs] as [outputs, blocks]."""
    return iter([np.broadcast_to(scales[:, None], shape)])


def without_logits(folder: Path, record: ComponentRecord) -> ComponentRecord:
    """The graph without its output layer, and the weights that are left."""
    return onnx_files.without_logits(folder, record)


def extras(folder: Path) -> tuple[str, ...]:
    """Write the graphs that `peaks` measures."""
    return cuda_probes.write(folder)


def peaks(folder: Path) -> Peaks:
    """Arithmetic in fp16, and the memory rate. Products of 8-bit weights are computed in fp16."""
    return cuda_probes.measure(folder, PROVIDER)


# -- run -------------------------------------------------------------------------------------


def open(
    folder: Path, record: ComponentRecord, model: Mapping[str, object], options: RunnerOptions
) -> CudaRunner:
    """Load one component onto the card. Raises BuildError or OutOfMemory with the reason."""
    stateful = any(port.updates for port in record.outputs)
    opened = cuda_sessions.open_session(
        folder / record.graph, PROVIDER, options.context, stateful=stateful
    )
    return CudaRunner(opened, record, options.context, PROVIDER.device)


class _Input:
    """A buffer on the device that a call's input is copied into."""

    def __init__(self, array: Array, dtype: str, device: Device) -> None:
        self.buffer = device_array.empty(array.shape, dtype, device)
        self._type = device_array.ELEMENTS[dtype][1]
        self._last: Array | None = None

    def set(self, array: Array) -> None:
        """Copy, unless the buffer holds the same already: most inputs of a decode step repeat."""
        if array.size == 0:
            return
        if self._last is not None and np.array_equal(self._last, array):
            return
        values = np.ascontiguousarray(array, self._type)
        self.buffer.value.update_inplace(values)
        self._last = values.copy() if values.nbytes <= _COMPARED_BYTES else None


class _Bound:
    """Buffers of one combination of shapes and slots, bound to the session.

    graph: the number of its CUDA graph, None for none. An output whose size does not follow from
    the inputs' axes is left to ONNX Runtime.
    """

    def __init__(
        self,
        session: Any,
        inputs: Mapping[str, _Input],
        states: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray | None],
        graph: int | None,
    ) -> None:
        self.inputs = inputs
        self._session, self._outputs, self._states = session, outputs, states
        self._options = cuda_sessions.run_options(graph)
        self._binding = session.io_binding()
        for name, array in [*((n, i.buffer) for n, i in inputs.items()), *states.items()]:
            self._binding.bind_input(name, *array.bound())
        for name, buffer in outputs.items():
            location = ("cpu",) if buffer is None else buffer.bound()
            self._binding.bind_output(name, *location)

    def run(self, wanted: Sequence[str]) -> dict[str, Array]:
        """Run on what the input buffers hold; the wanted outputs, copied from the device."""
        self._session.run_with_iobinding(self._binding, self._options)
        found = dict(zip(self._outputs, self._binding.get_outputs(), strict=True))
        results = dict[str, Array]()
        for name in wanted:
            buffer = self._outputs[name]
            results[name] = np.asarray((found[name] if buffer is None else buffer.value).numpy())
        return results


class CudaRunner:
    """An opened session with its buffers, which belong to the allocation of a state."""

    def __init__(
        self, opened: cuda_sessions.Opened, record: ComponentRecord, context: int, device: Device
    ) -> None:
        self._session, self.captures = opened.session, opened.captures
        self._record, self._context, self._device = record, context, device
        self._updated = [port.updates for port in record.outputs if port.updates]
        self._plain = [port for port in record.inputs if port.name not in self._updated]
        self._results = [port.name for port in record.outputs if not port.updates]
        types = {value.name: value.type for value in self._session.get_inputs()}
        self._formats = {name: _HALVES[types[name]] for name in self._updated}
        self._bindings: WeakKeyDictionary[Allocation, Bindings[_Bound]] = WeakKeyDictionary()
        self._stateless = State({}, 1, Allocation())
        self._graphs = itertools.count(1)

    def new_state(self, slots: int = 1) -> State:
        if slots < 1:
            raise InputError(f"a state of {slots} slots holds nothing")
        sizes = {"batch": slots, "context": self._context}
        ports = [port for port in self._record.inputs if port.name in self._updated]
        with _on_the_card(f"a KV cache of {slots} slots"):
            arrays = {
                p.name: device_array.zeros(_shape(p, sizes), self._formats[p.name], self._device)
                for p in ports
            }
        return State(arrays, slots, Allocation())

    def run(self, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """As Runner.run; what is bound to a state and shapes once is used again."""
        bound_state = state or self._stateless
        shapes = tuple(inputs[port.name].shape for port in self._plain)
        bindings = self._bindings.get(bound_state.allocation)
        if bindings is None:
            bindings = self._bindings[bound_state.allocation] = Bindings()
        decode = self._reads_one_token(inputs)
        with _on_the_card(self._record.name):
            bound = bindings.get(
                (bound_state.first, bound_state.count, shapes),
                lambda: self._bind(inputs, bound_state, decode=decode),
                decode=decode,
            )
            for port in self._plain:
                bound.inputs[port.name].set(inputs[port.name])
            return bound.run(self._results)

    def _reads_one_token(self, inputs: Mapping[str, Array]) -> bool:
        """Whether a call reads one token of each sequence, and scores it."""
        for port in self._plain:
            for name in ("sequence", "scored"):
                if name in port.shape and inputs[port.name].shape[port.shape.index(name)] != 1:
                    return False
        return bool(self._updated)

    def _bind(self, inputs: Mapping[str, Array], state: State, *, decode: bool) -> _Bound:
        axes: dict[str, int] = {}
        for port in self._plain:
            dimensions = zip(port.shape, inputs[port.name].shape, strict=True)
            axes |= {dim: size for dim, size in dimensions if isinstance(dim, str)}
        if self._updated:
            check(state, self._updated, axes["batch"], self._record.name)
        buffers = {
            port.name: _Input(
                inputs[port.name], "int64" if port.dtype == "int64" else "fp32", self._device
            )
            for port in self._plain
        }
        outputs: dict[str, DeviceArray | None] = {}
        for port in self._record.outputs:
            shape = _shape(port, axes)
            if port.updates:
                outputs[port.name] = state.arrays[port.updates]
            else:
                filled = all(shape)
                outputs[port.name] = (
                    device_array.empty(shape, "fp32", self._device) if filled else None
                )
        graph = next(self._graphs) if decode and self.captures else None
        bound = _Bound(self._session, buffers, state.arrays, outputs, graph)
        if graph is not None:
            finalize(bound, _release, ref(self._session), graph)
        return bound

    def layers(self) -> list[LayerTime]:
        """None: kernels run after the calls that ONNX Runtime's profile would time."""
        return []

    def close(self) -> None:
        self._bindings.clear()
        self._session = None


@contextmanager
def _on_the_card(what: str) -> Iterator[None]:
    """Errors of ONNX Runtime as ours: OutOfMemory or BuildError, with what was going on."""
    try:
        yield
    except ToolkitError:
        raise
    except Exception as reason:  # it raises many types of its own
        raise cuda_sessions.failed(f"{what} failed on the card", reason) from None


def _shape(port: Port, axes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a port; 0 for an axis that is not known."""
    return tuple(axes.get(n, 0) if isinstance(n, str) else n for n in port.shape)


def _release(session: ref[Any], graph: int) -> None:
    """Give a CUDA graph back whose buffers are gone."""
    opened = session()
    if opened is not None and hasattr(opened, "release_captured_graph"):
        opened.release_captured_graph(graph)
