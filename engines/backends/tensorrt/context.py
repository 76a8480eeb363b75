"""An engine made ready for one of its profiles: TensorRT's execution context, told only changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from edgevlm.engines.backends import LayerTime
from edgevlm.engines.backends.tensorrt import kernels
from edgevlm.engines.backends.tensorrt.arrays import Shape
from edgevlm.engines.backends.tensorrt.card import Arena
from edgevlm.engines.backends.tensorrt.plan import Plan, logger
from edgevlm.toolkit.errors import BuildError, OutOfMemory


class Context:
    """A profile with its shapes, addresses and memory to compute in."""

    def __init__(self, plan: Plan, profile: int, stream: Any, profiler: Any = None) -> None:
        self._plan, self._log = plan, logger(plan.trt)
        self._errors = self._log.count
        self._context = plan.context()
        if self._context is None:
            raise OutOfMemory(f"TensorRT has no room for one more context: {self._said()}")
        self._do("profile", self._context.set_optimization_profile_async(profile, handle(stream)))
        stream.sync()
        if profiler is not None:
            self._context.profiler = profiler
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)

    def shape(self, shapes: Mapping[str, Shape]) -> None:
        """Take inputs of these shapes, which the profile fits."""
        changed = {name: shape for name, shape in shapes.items() if self._shapes.get(name) != shape}
        for name, shape in changed.items():
            self._do(f"{name} {shape}", self._context.set_input_shape(name, shape))
            self._shapes[name] = shape
        if changed:
            lacking = self._context.infer_shapes()
            if lacking:
                raise BuildError(f"TensorRT lacks the shapes of {', '.join(lacking)}")

    def output(self, name: str) -> Shape:
        """The shape that an output has with the present inputs."""
        return tuple(self._context.get_tensor_shape(name))

    def place(self, addresses: Mapping[str, int], arena: Arena) -> None:
        """Read and write tensors at these addresses, and compute in the arena."""
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._do(name, self._context.set_tensor_address(name, address))
                self._addresses[name] = address
        memory = arena.block.address, arena.block.nbytes
        if memory != self._memory:
            self._context.set_device_memory(*memory)
            self._memory = memory

    def enqueue(self, stream: Any) -> None:
        """Run on a stream. Raises BuildError with TensorRT's reason where it cannot."""
        self._do("running", self._context.execute_async_v3(handle(stream)))

    def capturable(self, stream: Any) -> bool:
        """Whether TensorRT can record what it does on this stream; asked where it can say."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(handle(stream)))

    def _do(self, what: str, done: bool) -> None:
        """Raise BuildError with TensorRT's reason where it says that something was not done."""
        if not done:
            raise BuildError(f"TensorRT refused {what}: {self._said()}")

    def _said(self) -> str:
        """The first error that TensorRT logged since the last one that was told."""
        found = self._log.since(self._errors)
        self._errors = self._log.count
        return str(found[0])[:300] if found else "no reason given"


def handle(stream: Any) -> int:
    """A stream of cuda-core as TensorRT takes it."""
    return int(stream.handle)


class Times:
    """What TensorRT reports of each layer, of all contexts of a component."""

    def __init__(self, trt: Any, kinds: Mapping[str, str]) -> None:
        self._kinds = kinds
        found: dict[str, list[float]] = defaultdict(list)

        class Profiler(trt.IProfiler):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                """Called by TensorRT for each kernel of a run."""
                found[layer_name].append(float(ms))

        self._found = found
        self.profiler = Profiler()

    def layers(self) -> list[LayerTime]:
        """Slowest first."""
        times = [
            LayerTime(name, self._kinds.get(kernels.plain(name), "kernel"), sum(ms), len(ms))
            for name, ms in self._found.items()
        ]
        return sorted(times, key=lambda time: -time.total_ms)
