"""Backends, one file each; a Target names the one that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from edgevlm.engines.backends.state import State
from edgevlm.engines.lowering.capabilities import Decision
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import Target


@dataclass(frozen=True)
class Plugin:
    """A fused kernel that computes calls of an engine, in place of what the builder makes of them.

    op: whose calls (MSDeformAttn). name, namespace, version: in TensorRT's registry, or of an op of
    engines/native. library: whether our library has to be there where the engine runs; else the
    kernel lies in the plan. Without that of engines/native ONNX Runtime's kernels run.
    """

    op: str
    name: str
    namespace: str
    version: str
    library: bool


@dataclass(frozen=True)
class BuildOptions:
    """What builds of TensorRT alone can be asked for.

    plugins: ops that plugins of ours compute. strip: plans without weights, which lie beside them.
    """

    plugins: tuple[str, ...] = ()
    strip: bool = False


@dataclass(frozen=True)
class RunnerOptions:
    """How a component is opened: cache length in tokens, threads (0 = all), layer timing.

    beside: whether it runs at the same time as others of its session. plugins: that it may need.
    """

    context: int
    threads: int = 0
    profile: bool = False
    beside: bool = False
    plugins: tuple[Plugin, ...] = ()


@dataclass(frozen=True)
class LayerTime:
    """One node's share of a component's time, over all calls since it was opened."""

    name: str
    op: str
    total_ms: float
    calls: int


@dataclass(frozen=True)
class Peaks:
    """A machine's limits: arithmetic in float32, products of 8-bit weights, reading memory.

    Of a graphics card: arithmetic in fp16, products of 8-bit inputs and weights, copying. All in
    10^9 a second. fp8_gflop_s: of products of FP8 inputs and weights, 0 where there are none.
    """

    gflop_s: float
    int8_gop_s: float
    gb_s: float
    fp8_gflop_s: float = 0.0


Size = tuple[int, int, int]  # smallest, usual and largest


@dataclass(frozen=True)
class Shapes:
    """What the calls of a component may be, for backends that compile for shapes.

    context: positions of the KV cache. profiles: a size for every dimension that changes between
    calls; a component may have several, each compiled by itself (prompts, and single tokens).
    """

    context: int
    profiles: tuple[Mapping[str, Size], ...]


@dataclass(frozen=True)
class PlanReport:
    """What TensorRT's builder made of a component.

    layers: of the parsed network. kernels: of the plan, all profiles together. attentions: in the
    graph; fused_attentions: those with a kernel of their own, the others run in simpler ops.
    Weights, activations and plan in bytes; peak_rss_mb, seconds: of the build. rounded: products
    whose inputs the graph has in INT8 or FP8; rounded_kernels: those that a kernel of that format
    computes, the others have become floats. profiles: combinations of sizes that are compiled by
    themselves; rows: the most sequences, or images, of one call.
    """

    layers: int
    kernels: int
    attentions: int
    fused_attentions: int
    given_weights_bytes: int
    held_weights_bytes: int
    activations_bytes: int
    plan_bytes: int
    peak_rss_mb: float
    seconds: float
    rounded: int = 0
    rounded_kernels: int = 0
    profiles: int = 1
    rows: int = 1


class Runner(Protocol):
    """An opened component. It holds no state; calls must not overlap."""

    def new_state(self, slots: int = 1) -> State:
        """An empty KV state of `slots` sequences; without arrays if the component has none."""
        ...

    def run(self, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """Outputs by port name, without the states, which are updated in place.

        state: as many slots as the inputs have rows; None for a component without a state.
        Outputs stay valid until the next call with the same state.
        """
        ...

    def layers(self) -> list[LayerTime]:
        """Time per node, slowest first; ends the timing. Needs RunnerOptions.profile."""
        ...

    def close(self) -> None:
        """Release the component's memory."""
        ...


@dataclass(frozen=True)
class Compiled:
    """The result of compiling one component: its files in the engine folder, and notes.

    precision: the number format it computes in, which sets the tolerance of the goldens.
    lowering: a decision per kind of op; empty for a backend that lowers nothing. plan: of TensorRT.
    searchable: whether --bisect can run its graph, op by op, as the backend would; provider: who
    does so, of ONNX Runtime. plugins: used.
    """

    record: ComponentRecord
    files: tuple[str, ...]
    precision: str = "fp32"
    notes: tuple[str, ...] = ()
    lowering: tuple[Decision, ...] = ()
    plan: PlanReport | None = None
    searchable: bool = True
    provider: Any = "CPUExecutionProvider"
    plugins: tuple[Plugin, ...] = ()


class Backend(Protocol):
    """What a backend file offers."""

    def here(self) -> Target:
        """This machine as a target of this backend."""
        ...

    def check_builds(self, target: Target) -> bool:
        """Whether engines for `target` can be built on a machine that cannot run them.

        Raises MissingExtra or TargetMismatch where what it takes is not installed.
        """
        ...

    def compile(
        self,
        source: Path,
        dtype: str,
        record: ComponentRecord,
        folder: Path,
        target: Target,
        shapes: Shapes,
    ) -> Compiled:
        """Write one component's engine files into `folder`.

        source: the folder with its graph and weights; dtype: of the weights left in float.
        """
        ...

    def without_logits(self, folder: Path, record: ComponentRecord) -> ComponentRecord:
        """Cut from a compiled decoder what only logits need; it fills the KV cache then."""
        ...

    def extras(self, folder: Path) -> tuple[str, ...]:
        """Write the files that belong to no component into `folder`; returns their names."""
        ...

    def open(
        self,
        folder: Path,
        record: ComponentRecord,
        model: Mapping[str, object],
        options: RunnerOptions,
    ) -> Runner:
        """Load one component."""
        ...

    def peaks(self, folder: Path) -> Peaks:
        """This machine's limits, measured with the backend's own kernels."""
        ...


_FILES = {"onnxruntime-cuda": "onnxruntime_cuda", "tensorrt-rtx": "tensorrt"}


def backend(target: Target, options: BuildOptions | None = None) -> Backend:
    """The backend of a target: a file of this folder, or of TensorRT's two products one.

    options: of its builds. Raises UnsupportedError for --strip-weights elsewhere.
    """
    file = _FILES.get(target.backend, target.backend)
    module = import_module(f"edgevlm.engines.backends.{file}")
    if hasattr(module, "of"):
        return cast(Backend, module.of(target, options or BuildOptions()))
    if options and options.strip:
        raise UnsupportedError(
            f"--strip-weights is for plans of TensorRT, and {target} has none",
            hint="leave it out: an engine's weights lie in a file of their own there",
        )
    return cast(Backend, module)
