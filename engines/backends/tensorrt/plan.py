"""A plan on disk made an engine on the card, and what it says of its inputs and outputs."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgevlm.engines.backends.tensorrt import jit, refit
from edgevlm.engines.backends.tensorrt.arrays import Shape
from edgevlm.toolkit.errors import BuildError, OutOfMemory, TargetMismatch, ToolkitError

# What TensorRT logs of a plan that it refuses; of anything else the plan itself is to blame.
_ELSEWHERE = ("not compatible", "incompatible device", "Version tag", "platform")
_NO_MEMORY = ("out of memory", "OutOfMemory")

Limits = Mapping[str, tuple[Shape, Shape]]  # smallest and largest shape by input


@dataclass(frozen=True)
class Plan:
    """An engine. kinds: the formats of its inputs and outputs, names of trt.DataType. profiles:
    for each the shapes that it takes. activations_bytes: what the largest profile computes in.
    config: of jit.py, None for TensorRT. refit_ms: what putting its weights into it took.
    """

    trt: Any
    engine: Any
    kinds: Mapping[str, str]
    profiles: tuple[Limits, ...]
    activations_bytes: int
    config: Any
    refit_ms: float = 0.0

    def context(self) -> Any:
        """An execution context without memory of its own, None where TensorRT makes none."""
        kinds = self.trt.ExecutionContextAllocationStrategy
        return self.engine.create_execution_context(self.config or kinds.USER_MANAGED)

    def profile(self, shapes: Mapping[str, Shape]) -> int | None:
        """The profile made for the least beside these shapes, None where none takes them."""
        fits = [
            (_elements(limits), number)
            for number, limits in enumerate(self.profiles)
            if all(_within(shapes[name], *ends) for name, ends in limits.items())
        ]
        return min(fits)[1] if fits else None


def read(trt: Any, file: Path, compiled: Path, graph: Path | None = None) -> Plan:
    """Load a plan onto the card that is current in this thread; compiled: of jit.file_of.

    graph: that with the weights, of a plan without them.
    Raises TargetMismatch for one of another release or card, OutOfMemory, or BuildError with
    TensorRT's reason.
    """
    log = logger(trt)
    since = log.count
    runtime = trt.Runtime(log)
    if not file.stat().st_size:
        raise _refused(file, "the file is empty")
    with file.open("rb") as opened:  # mapped: the host need not hold it as well
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise _reason(trt, runtime, file, data, log.since(since))
    refit_ms = refit.refit(trt, engine, graph, log) if graph else 0.0
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n).name == "INPUT"]
    profiles = range(engine.num_optimization_profiles)
    return Plan(
        trt,
        engine,
        {name: str(engine.get_tensor_dtype(name).name) for name in names},
        tuple({name: _limits(engine, name, number) for name in inputs} for number in profiles),
        int(engine.device_memory_size_v2),
        jit.config(trt, engine, compiled),
        refit_ms,
    )


def _limits(engine: Any, name: str, profile: int) -> tuple[Shape, Shape]:
    """The smallest and the largest shape of an input in a profile."""
    shape = tuple(engine.get_tensor_shape(name))
    if -1 not in shape:
        return shape, shape
    least, _, most = engine.get_tensor_profile_shape(name, profile)
    return tuple(least), tuple(most)


def _within(shape: Shape, least: Shape, most: Shape) -> bool:
    """Whether a profile takes a shape, an empty axis made as long as the profile needs it."""
    return len(shape) == len(most) and all(
        (low <= n or not n) and n <= high for n, low, high in zip(shape, least, most, strict=True)
    )


def _elements(limits: Limits) -> int:
    """How large a profile is beside others: the lengths of all axes together."""
    return sum(sum(most) for _, most in limits.values())


# -- what TensorRT says -----------------------------------------------------------------------


@cache
def logger(trt: Any) -> Any:
    """The logger of this process: TensorRT keeps the first that it is given to its end."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.count = 0
            self._lines: deque[tuple[int, int, str]] = deque(maxlen=200)

        def log(self, severity: Any, text: str) -> None:
            """Called by TensorRT; keeps errors alone, with the thread that made them."""
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.count += 1
                self._lines.append((self.count, threading.get_ident(), text))

        def since(self, count: int) -> list[str]:
            """Errors after so many, of this thread."""
            here = threading.get_ident()
            return [text for at, thread, text in self._lines if at > count and thread == here]

    return Logger()


def _reason(
    trt: Any, runtime: Any, file: Path, data: mmap.mmap, errors: Sequence[str]
) -> ToolkitError:
    """Why a plan was refused, by what the runtime knows of it or else by what it logged."""
    first = errors[0].splitlines()[0] if errors else "no reason given"
    if hasattr(runtime, "get_engine_validity"):
        _, found = runtime.get_engine_validity(data)
        kinds = trt.EngineInvalidityDiagnostics
        if int(found) & int(kinds.MALFORMED_ENGINE):
            return _refused(file, "the file is damaged")
        if int(found) & int(kinds.INSUFFICIENT_GPU_MEMORY):
            return _too_large(file, first)
        if int(found) & (int(kinds.VERSION_MISMATCH) | int(kinds.UNSUPPORTED_CC)):
            return _elsewhere(file, first)
        if int(found) & (int(kinds.OLD_CUDA_DRIVER) | int(kinds.OLD_CUDA_RUNTIME)):
            return _elsewhere(file, f"it needs a newer driver: {first}")
    text = " ".join(errors)
    if any(word in text for word in _NO_MEMORY):
        return _too_large(file, first)
    if any(word in text for word in _ELSEWHERE):
        return _elsewhere(file, first)
    damaged = "the file is damaged: " if "agic" in text else ""  # "Magic tag", "magicTag"
    return _refused(file, damaged + first)


def _refused(file: Path, why: str) -> BuildError:
    return BuildError(f"TensorRT cannot load {file.name}: {why[:300]}")


def _elsewhere(file: Path, why: str) -> TargetMismatch:
    return TargetMismatch(
        f"{file.name} was built for another release of TensorRT or another card: {why[:300]}"
    )


def _too_large(file: Path, why: str) -> OutOfMemory:
    return OutOfMemory(
        f"{file.name} does not fit onto the card: {why[:300]}",
        hint="end other programs that use it, or build with --precision int8 or int4",
    )
