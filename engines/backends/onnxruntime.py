"""ONNX Runtime: graphs are lowered at build; buffers, those of the KV state too, are bound once.

A call with shapes and slots seen before (every decode step) copies its few inputs into bound
buffers and runs; nothing else moves. The arrays of a state are bound as inputs and as outputs.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from edgevlm.engines.backends import (
    Compiled,
    LayerTime,
    Peaks,
    RunnerOptions,
    Shapes,
    native,
    onnx_files,
    probes,
    sessions,
)
from edgevlm.engines.backends.bindings import Bindings
from edgevlm.engines.backends.state import Allocation, State, check, zeros
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.checkpoints.safetensors_io import Blocks, SafetensorsFile, row_blocks
from edgevlm.toolkit.errors import BuildError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import static
from edgevlm.toolkit.target import (
    Target,
    load_onnxruntime,
    machine,
    saturates_int8,
    this_cpu,
    threads_here,
)

if TYPE_CHECKING:
    import onnx

_CHANGED = "if the engine was changed since it was built, build it again"
_TYPES = {"float": np.float32, "int64": np.int64}


def here() -> Target:
    """ONNX Runtime on this machine's processor."""
    return this_cpu()


# -- build -----------------------------------------------------------------------------------


def check_builds(target: Target) -> bool:
    """Never: what is compiled is compared with the reference at once."""
    return False


def compile(
    source: Path,
    dtype: str,
    record: ComponentRecord,
    folder: Path,
    target: Target,
    shapes: Shapes,
) -> Compiled:
    """Lower one component; weights are linked if they need no upcast."""
    model = onnx_files.read_graph(source / record.graph, source / record.weights)
    from edgevlm.engines.lowering import capabilities, lower, signed

    lowered = lower.lower_component(record.name, model, target)
    model, notes = lowered.model, list[str]()
    if (computed := capabilities.of(target).computes_in(dtype)) != dtype and lower.upcast(model):
        notes.append(f"{dtype} upcast to {computed}: this processor has no half kernels")
    flipped = frozenset[str]() if _unsigned_is_best() else signed.sign_weights(model)
    file = SafetensorsFile(source / record.weights)
    in_fp8 = frozenset(name for name, entry in file.entries.items() if entry.dtype == "fp8")
    if in_fp8:
        notes.append("FP8 is multiplied as float32: neither smaller nor faster here than float32")
    changes = _changes(file, flipped, in_fp8) if notes or flipped else {}
    onnx_files.write(source, folder, record, model, changes)
    return Compiled(
        record,
        (record.graph, record.weights),
        _precision(model, computed),
        tuple(notes),
        lowered.decisions,
    )


def _precision(model: onnx.ModelProto, computed: str) -> str:
    """What a lowered graph computes in, as check.py's tolerances name it."""
    kinds = {node.op_type for node in model.graph.node}
    if "MatMulNBits" in kinds:  # its kernel rounds the inputs, which the reference does not
        return "int8"
    if any(t.data_type == t.FLOAT8E4M3FN for t in model.graph.initializer):
        return "fp8"
    rounds = {"MatMulInteger", "MatMulIntegerToFloat", "QuantizeLinear"}  # as the reference does
    return "int8_rows" if kinds & rounds else computed


def _unsigned_is_best() -> bool:
    """Whether 8-bit weights are multiplied as they are stored: not on x86 with VNNI."""
    return machine() != "x86_64" or saturates_int8()


def _changes(
    file: SafetensorsFile, signed: frozenset[str], in_fp8: frozenset[str]
) -> dict[str, onnx_files.Change]:
    """Floats as float32, the codes of `signed` as int8, and those in FP8 as their values."""
    changes = dict[str, onnx_files.Change]()
    for name, entry in file.entries.items():
        if name in signed:
            changes[name] = onnx_files.Change("int8", entry.shape, _flipped)
        elif name in in_fp8:
            step = file.read(name + static.SCALE)
            changes[name] = onnx_files.Change("fp32", entry.shape, partial(_values, step))
        elif entry.dtype in ("fp16", "bf16"):
            changes[name] = onnx_files.Change("fp32", entry.shape)
    return changes


def _values(step: Array, codes: Array) -> Blocks:
    return (static.dequantize(block, step, static.FP8) for block in row_blocks(codes))


def _flipped(codes: Array) -> Blocks:
    return ((block ^ np.uint8(128)).view(np.int8) for block in row_blocks(codes))


def without_logits(folder: Path, record: ComponentRecord) -> ComponentRecord:
    """The graph without its output layer, and the weights that are left."""
    return onnx_files.without_logits(folder, record)


def extras(folder: Path) -> tuple[str, ...]:
    """Write the graphs that `peaks` measures."""
    return probes.write(folder)


def peaks(folder: Path) -> Peaks:
    """Arithmetic in both precisions, and the memory rate."""
    options = _session_options(RunnerOptions(context=1))
    return probes.measure(folder, lambda path: sessions.open_session(path, options))


# -- run -------------------------------------------------------------------------------------


def _session_options(options: RunnerOptions, *, stateful: bool = False) -> Any:
    """Options with the session's threads. Only a decoder's threads spin between calls: its next
    call comes at once, while an encoder's would compete with the components after it.
    """
    load_onnxruntime()
    settings = sessions.session_options(options.threads or threads_here())
    if not stateful:
        settings.add_session_config_entry("session.force_spinning_stop", "1")
    if options.profile:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(tempfile.mkdtemp()) / "profile")
    return settings


def open(
    folder: Path, record: ComponentRecord, model: Mapping[str, object], options: RunnerOptions
) -> OnnxRuntimeRunner:
    """Load one component. Raises BuildError with ONNX Runtime's reason."""
    stateful = any(port.updates for port in record.outputs)
    settings = _session_options(options, stateful=stateful)
    try:
        session = native.open_session(folder, record, options, settings)
    except Exception as refused:  # ONNX Runtime raises many types of its own
        raise BuildError(
            f"ONNX Runtime cannot load {record.graph}: {refused}",
            hint=_CHANGED,
        ) from None
    graph = {value.name for value in (*session.get_inputs(), *session.get_outputs())}
    lacking = [port.name for port in (*record.inputs, *record.outputs) if port.name not in graph]
    if lacking:
        raise BuildError(f"{record.graph} has no input or output called {lacking[0]}")
    return OnnxRuntimeRunner(session, record, options)


class _Bound:
    """Buffers of one combination of shapes, bound to the session.

    An output whose size does not follow from the inputs' axes is left to ONNX Runtime.
    """

    def __init__(
        self, session: Any, inputs: dict[str, Array], outputs: dict[str, Array | None]
    ) -> None:
        self.inputs = inputs
        self._session, self._outputs = session, list(outputs)
        self._allocated = {name: array for name, array in outputs.items() if array is not None}
        self._binding = session.io_binding()
        for name, array in inputs.items():
            self._binding.bind_input(name, *_address(array))
        for name, buffer in outputs.items():
            location = ("cpu",) if buffer is None else _address(buffer)
            self._binding.bind_output(name, *location)

    def run(self) -> dict[str, Array]:
        """Run on what the input buffers hold."""
        self._session.run_with_iobinding(self._binding)
        allocated = self._allocated
        if len(allocated) == len(self._outputs):
            return allocated
        values = zip(self._outputs, self._binding.get_outputs(), strict=True)
        return {
            name: allocated[name] if name in allocated else value.numpy() for name, value in values
        }


def _address(array: Array) -> tuple[Any, ...]:
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data


class OnnxRuntimeRunner:
    """An opened session with its buffers.

    Buffers are bound for one combination of shapes and slots. They belong to the allocation of the
    state: when that is released, they go too.
    """

    def __init__(self, session: Any, record: ComponentRecord, options: RunnerOptions) -> None:
        self._session = session
        self._record = record
        self._profile, self._context = options.profile, options.context
        self._updated = [port.updates for port in record.outputs if port.updates]
        self._plain = [port for port in record.inputs if port.name not in self._updated]
        self._results = [port.name for port in record.outputs if not port.updates]
        self._bindings: WeakKeyDictionary[Allocation, Bindings[_Bound]] = WeakKeyDictionary()
        self._stateless = zeros((), (), context=options.context)
        # Where the tokens of a call are counted: (input, axis); None where no sequence is read.
        self._tokens = next(
            (
                (number, port.shape.index("sequence"))
                for number, port in enumerate(self._plain)
                if "sequence" in port.shape
            ),
            None,
        )

    def new_state(self, slots: int = 1) -> State:
        inputs, outputs = self._record.inputs, self._record.outputs
        return zeros(inputs, outputs, context=self._context, slots=slots)

    def run(self, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """As Runner.run; what is bound to a state and shapes once is used again."""
        bound_state = state or self._stateless
        shapes = tuple(inputs[port.name].shape for port in self._plain)
        bindings = self._bindings.get(bound_state.allocation)
        if bindings is None:
            bindings = self._bindings[bound_state.allocation] = Bindings()
        bound = bindings.get(
            (bound_state.first, bound_state.count, shapes),
            lambda: self._bind(inputs, bound_state),
            decode=self._reads_one_token(shapes),
        )
        for port in self._plain:
            np.copyto(bound.inputs[port.name], inputs[port.name])
        try:
            outputs = bound.run()
        except Exception as failed:  # ONNX Runtime raises many types of its own
            raise BuildError(
                f"{self._record.name}: ONNX Runtime failed: {failed}", hint=_CHANGED
            ) from None
        return {name: outputs[name] for name in self._results}

    def _reads_one_token(self, shapes: Sequence[tuple[int, ...]]) -> bool:
        return self._tokens is not None and shapes[self._tokens[0]][self._tokens[1]] == 1

    def _bind(self, inputs: Mapping[str, Array], state: State) -> _Bound:
        buffers = {p.name: np.empty(inputs[p.name].shape, _TYPES[p.dtype]) for p in self._plain}
        axes: dict[str, int] = {}
        for port in self._plain:
            dimensions = zip(port.shape, buffers[port.name].shape, strict=True)
            axes |= {dim: size for dim, size in dimensions if isinstance(dim, str)}
        if self._updated:
            check(state, self._updated, axes["batch"], self._record.name)
        outputs: dict[str, Array | None] = {}
        for port in self._record.outputs:
            shape = [axes.get(n, 0) if isinstance(n, str) else n for n in port.shape]
            if port.updates:
                outputs[port.name] = state.arrays[port.updates]
            else:
                outputs[port.name] = np.empty(shape, np.float32) if all(shape) else None
        return _Bound(self._session, {**buffers, **state.arrays}, outputs)

    def layers(self) -> list[LayerTime]:
        if not self._profile:
            return []
        file = Path(self._session.end_profiling())
        events = json.loads(file.read_text())
        file.unlink()
        file.parent.rmdir()
        return _layer_times(events)

    def close(self) -> None:
        self._bindings.clear()
        self._session = None


def _layer_times(events: list[dict[str, Any]]) -> list[LayerTime]:
    total: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            total[name, event["args"]["op_name"]].append(event["dur"] / 1000)
    times = [LayerTime(name, op, sum(ms), len(ms)) for (name, op), ms in total.items()]
    return sorted(times, key=lambda t: -t.total_ms)
