"""A stand-in of cuda-core: a card whose memory is the host's, whose streams run when waited for.

It refuses what a driver would: memory that was freed or is too short, work in a thread without a
device, waiting while a graph is recorded. Copies and kernels read memory when their stream runs
them, so that whoever does not wait reads old values.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgevlm.toolkit.ops.vocabulary import Array
from tests.engines.backends.tensorrt import api

Work = Callable[[], None]
GUARD = 4096


class World:
    """A card and its driver. log: what was asked, in order. fail_at: the allocation to refuse."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.blocks: dict[int, Array] = {}
        self.host: dict[int, Array] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs = 0
        self.capacity = 1 << 30
        self.threads = threading.local()
        self.api = api.of(api.CUDA)
        self._next = 0x7_0000_0000
        self._guard = threading.Lock()

    def names(self) -> list[str]:
        return [entry[0] for entry in self.log]

    @property
    def live(self) -> int:
        """Bytes of the card that are allocated."""
        return sum(array.nbytes for array in self.blocks.values())

    def check_thread(self) -> None:
        if not getattr(self.threads, "current", False):
            raise CudaError("CUDA_ERROR_INVALID_CONTEXT: no device is current in this thread")

    def allocate(self, nbytes: int) -> int:
        self.check_thread()
        with self._guard:
            if self.live + nbytes > self.capacity:
                raise CudaError("CUDA_ERROR_OUT_OF_MEMORY: no more memory")
            address = self._next
            self._next += -(-(nbytes + GUARD) // 512) * 512
            self.blocks[address] = np.full(nbytes, 0xFF, np.uint8)  # NaN in every float format
            self.log.append(("allocate", address, nbytes))
        return address

    def pin(self, nbytes: int) -> int:
        with self._guard:
            memory = np.full(nbytes, 0xFF, np.uint8)
            address = int(memory.ctypes.data)
            self.host[address] = memory
            self.log.append(("pin", address, nbytes))
        return address

    def free(self, address: int) -> None:
        with self._guard:
            where = self.blocks if address in self.blocks else self.host
            del where[address]
            self.log.append(("free", address))

    def memory(self, address: int, nbytes: int, *, card: bool = False) -> Array:
        """Bytes at an address, which have to be in one live block."""
        for where in (self.blocks,) if card else (self.blocks, self.host):
            for begin, block in where.items():
                if begin <= address and address + nbytes <= begin + block.nbytes:
                    return block[address - begin : address - begin + nbytes]
        raise CudaError(f"CUDA_ERROR_ILLEGAL_ADDRESS: {nbytes} bytes at {address:#x}")

    def enqueue(self, handle: int, work: Work) -> None:
        self.check_thread()
        self.streams[handle].enqueue(work)


class CudaError(Exception):
    """As cuda-core's, which is of no type of its own either."""


class Stream:
    def __init__(self, world: World) -> None:
        self._world, self.handle = world, 0x100 + len(world.streams)
        self._work: list[Work] = []
        self.recording: list[Work] | None = None
        world.streams[self.handle] = self

    def enqueue(self, work: Work) -> None:
        if self.handle not in self._world.streams:
            raise CudaError("CUDA_ERROR_INVALID_HANDLE: a closed stream")
        (self._work if self.recording is None else self.recording).append(work)

    def sync(self) -> None:
        self._world.check_thread()
        if self.recording is not None:
            raise CudaError("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        work, self._work = self._work, []
        for step in work:
            step()

    def create_graph_builder(self) -> GraphBuilder:
        return GraphBuilder(self._world, self)

    def close(self) -> None:
        del self._world.streams[self.handle]


class GraphBuilder:
    def __init__(self, world: World, stream: Stream) -> None:
        self._world, self._stream = world, stream
        self._work: list[Work] | None = None

    @property
    def stream(self) -> Stream:
        return self._stream

    def begin_building(self, mode: str = "relaxed") -> GraphBuilder:
        self._stream.recording = []
        return self

    def end_building(self) -> GraphBuilder:
        self._work, self._stream.recording = self._stream.recording, None
        return self

    def complete(self, options: object = None) -> Graph:
        assert self._work is not None
        self._world.log.append(("graph", len(self._work)))
        return Graph(self._world, self._work)

    def close(self) -> None:
        self._work = None


class Graph:
    def __init__(self, world: World, work: list[Work]) -> None:
        self._world, self._work = world, work
        world.graphs += 1
        self._open = True

    def launch(self, stream: Stream) -> None:
        assert self._open
        self._world.log.append(("launch",))
        for step in self._work:
            stream.enqueue(step)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._world.graphs -= 1

    def __del__(self) -> None:
        self.close()


class Buffer:
    def __init__(self, world: World, address: int, size: int, *, owns: bool) -> None:
        self._world, self.handle, self.size, self._owns = world, address, size, owns

    def copy_from(self, src: Buffer, *, stream: Stream | GraphBuilder, options: Any = None) -> None:
        if self.size != src.size:
            raise ValueError("buffer sizes mismatch between src and dst")
        world, ends, size = self._world, (self.handle, src.handle), self.size
        kind = "copy in" if src.handle in world.host else "copy"
        kind = "copy out" if self.handle in world.host else kind

        def work() -> None:
            world.memory(ends[0], size)[:] = world.memory(ends[1], size)

        for end in ends:
            world.memory(end, size)
        world.log.append((kind, size))
        world.enqueue(_stream(stream).handle, work)

    def fill(self, value: int, *, stream: Stream) -> None:
        world, at, size = self._world, self.handle, self.size

        def work() -> None:
            world.memory(at, size)[:] = value

        world.log.append(("fill", at, size, value))
        world.enqueue(stream.handle, work)

    def close(self, stream: Stream | None = None) -> None:
        if self._owns:
            self._owns = False
            self._world.free(self.handle)

    def __del__(self) -> None:
        self.close()


def _stream(stream: Stream | GraphBuilder) -> Stream:
    return stream.stream if isinstance(stream, GraphBuilder) else stream


class Device:
    def __init__(self, world: World, number: int = 0) -> None:
        self._world = world

    def set_current(self, ctx: None = None) -> None:
        self._world.threads.current = True

    def create_stream(self, obj: None = None, options: None = None) -> Stream:
        self._world.check_thread()
        return Stream(self._world)

    def allocate(self, size: int, *, stream: Stream) -> Buffer:
        assert stream.handle in self._world.streams
        return Buffer(self._world, self._world.allocate(size), size, owns=True)


class LegacyPinnedMemoryResource:
    def __init__(self, world: World) -> None:
        self._world = world

    def allocate(self, size: int, *, stream: Stream | None = None) -> Buffer:
        self._world.check_thread()
        return Buffer(self._world, self._world.pin(size), size, owns=True)


def install(patch: pytest.MonkeyPatch) -> World:
    """`cuda.core` for one test."""
    world = World()
    for kind in (Stream, GraphBuilder, Graph, Buffer, Device, LegacyPinnedMemoryResource):
        _check_like_the_real_one(world, kind)
    core = ModuleType("cuda.core")

    class Buffers:
        @staticmethod
        def from_handle(ptr: int, size: int) -> Buffer:
            return Buffer(world, ptr, size, owns=False)

    vars(core).update(
        Device=lambda number=0: Device(world, number),
        LegacyPinnedMemoryResource=lambda: LegacyPinnedMemoryResource(world),
        Buffer=Buffers,
    )
    patch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    patch.setitem(sys.modules, "cuda.core", core)
    return world


def _check_like_the_real_one(world: World, kind: type) -> None:
    """The stand-in has no method that cuda-core lacks, and each takes what cuda-core's takes."""
    for name, value in vars(kind).items():
        if name.startswith("_") or not callable(value) or name in ("enqueue",):
            continue
        code = value.__code__
        plain = code.co_argcount - 1 - len(value.__defaults__ or ())
        needed = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
        keywords = [n for n in needed if n not in (value.__kwdefaults__ or {})]
        world.api.check_call(kind.__name__, name, plain, keywords)
