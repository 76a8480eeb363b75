"""Backends, one file each; a Target names the one that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from edgevlm.engines.backends.state import State
from edgevlm.engines.lowering.capabilities import Decision
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import Target


@dataclass(frozen=True)
class RunnerOptions:
    """How a component is opened: cache length in tokens, threads (0 = all), layer timing."""

    context: int
    threads: int = 0
    profile: bool = False


@dataclass(frozen=True)
class LayerTime:
    """One node's share of a component's time, over all calls since it was opened."""

    name: str
    op: str
    total_ms: float
    calls: int


@dataclass(frozen=True)
class Peaks:
    """A machine's limits: arithmetic in float32, products of 8-bit weights, reading memory."""

    gflop_s: float
    int8_gop_s: float
    gb_s: float


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
    lowering: a decision per kind of op; empty for a backend that lowers nothing.
    """

    record: ComponentRecord
    files: tuple[str, ...]
    precision: str = "fp32"
    notes: tuple[str, ...] = ()
    lowering: tuple[Decision, ...] = ()


class Backend(Protocol):
    """What a backend file offers."""

    def here(self) -> Target:
        """This machine as a target of this backend."""
        ...

    def compile(
        self, source: Path, dtype: str, record: ComponentRecord, folder: Path, target: Target
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


def backend(target: Target) -> Backend:
    """The backend of a target. Raises UnsupportedError where none has been written yet."""
    try:
        return cast(Backend, import_module(f"edgevlm.engines.backends.{target.backend}"))
    except ModuleNotFoundError as missing:
        if not (missing.name or "").startswith("edgevlm.engines.backends"):
            raise
        raise UnsupportedError(
            f"this version cannot build or run {target.backend} engines",
            hint="build for this machine's processor: --target cpu",
        ) from None
