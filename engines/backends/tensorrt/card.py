"""A graphics card through cuda-core: streams, memory of the card and of the host, graphs.

Whoever uses a card in a thread calls `use` first: CUDA has a current device for every thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Lock
from typing import Any
from weakref import WeakSet

import numpy as np

from edgevlm.toolkit.errors import InputError, OutOfMemory, TargetMismatch, needing
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.terminal.console import human_bytes

_ALIGNED = 256  # bytes: a tensor begins at a multiple, as what CUDA allocates does
_NO_MEMORY = ("OUT_OF_MEMORY", "MEMORYALLOCATION")


def aligned(nbytes: int) -> int:
    """The next multiple of the alignment, at least one."""
    return max(-(-nbytes // _ALIGNED), 1) * _ALIGNED


class Block:
    """Memory of the card, or of the host where the card reads it directly.

    It is freed with the last reference, or by its card.
    """

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer
        self._address, self.nbytes = int(buffer.handle), int(buffer.size)

    @property
    def address(self) -> int:
        """Where it begins. Raises InputError where it was freed with its session."""
        if self._buffer is None:
            raise InputError("the session that held this memory is closed")
        return self._address

    def host(self) -> Array:
        """The bytes of a block of the host's; the block has to live as long as the array."""
        memory = (ctypes.c_char * self.nbytes).from_address(self.address)
        return np.frombuffer(memoryview(memory).cast("B"), np.uint8)

    def close(self) -> None:
        """Free the memory."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            buffer.close()


class Card:
    """The card as the components of one session use it. Raises TargetMismatch where there is none.

    arena: for the activations of components that run one after another.
    """

    def __init__(self, extra: str, number: int = 0) -> None:
        self._core, self._number = _cuda_core(extra), number
        try:
            self.use()
            self._stream = self._device().create_stream()
        except Exception as refused:  # of cuda-core, of its bindings, of its search for the driver
            raise TargetMismatch(f"CUDA finds no graphics card here: {refused}") from None
        self._host_memory = self._core.LegacyPinnedMemoryResource()
        self._blocks: WeakSet[Block] = WeakSet()
        self._guard = Lock()
        self._spare: Block | None = None
        self.arena = Arena(self)

    def use(self) -> None:
        """Make it the current device of this thread."""
        self._device().set_current()

    def stream(self) -> Any:
        """A stream of its own."""
        return self._device().create_stream()

    def block(self, nbytes: int, *, zeros: bool = False) -> Block:
        """Memory of the card, ready for every stream. Raises OutOfMemory."""

        def allocate() -> Any:
            return self._device().allocate(aligned(nbytes), stream=self._stream)

        with self._guard:
            block = self._made(allocate, nbytes, "of the card")
            if zeros:
                self.view(block.address, block.nbytes).fill(0, stream=self._stream)
            self._stream.sync()
        return block

    def staging(self, nbytes: int) -> Block:
        """Memory of the host that the card copies from and to. Raises OutOfMemory."""
        with self._guard:
            return self._made(
                lambda: self._host_memory.allocate(aligned(nbytes)), nbytes, "of the host, pinned"
            )

    def _made(self, allocate: Callable[[], Any], nbytes: int, where: str) -> Block:
        """A block that this card frees when it is closed. Raises OutOfMemory."""
        try:
            block = Block(allocate())
        except Exception as refused:  # cuda-core raises one type for everything
            if not any(word in str(refused).upper() for word in _NO_MEMORY):
                raise
            raise OutOfMemory(
                f"{human_bytes(nbytes)} more of memory {where} are not free",
                hint="end other programs that use the card, or build with --precision int8 or "
                "int4, a smaller --max-context, or --max-image-tiles",
            ) from None
        self._blocks.add(block)
        return block

    def view(self, address: int, nbytes: int) -> Any:
        """Memory that something else owns, for cuda-core's copies."""
        return self._core.Buffer.from_handle(address, nbytes)

    def copy(self, target: int, source: int, nbytes: int, stream: Any = None) -> None:
        """Copy between two addresses; without a stream, it is done on return."""
        buffers = self.view(target, nbytes), self.view(source, nbytes)
        buffers[0].copy_from(buffers[1], stream=stream or self._stream)
        if stream is None:
            self._stream.sync()

    def exchange(self, a: int, b: int, nbytes: int) -> None:
        """Make the bytes at each of two addresses what the others were; done on return.

        The memory between is kept for the next time.
        """
        spare = self._spare
        if spare is None or spare.nbytes < nbytes:
            spare = self._spare = self.block(nbytes)
        with self._guard:
            for target, source in ((spare.address, a), (a, b), (b, spare.address)):
                self.copy(target, source, nbytes, self._stream)
            self._stream.sync()

    def close(self) -> None:
        """Free what was allocated and is not freed yet."""
        self.use()
        for block in list(self._blocks):
            block.close()
        self._stream.sync()
        self._stream.close()

    def _device(self) -> Any:
        return self._core.Device(self._number)


class Arena:
    """Memory that components in turn compute in; as large as the one that needs most."""

    def __init__(self, card: Card) -> None:
        self._card, self._guard = card, Lock()
        self._block: Block | None = None

    def reserve(self, nbytes: int) -> None:
        """Have room for a component. Nothing may be running in it."""
        with self._guard:
            if self._block is None or self._block.nbytes < nbytes:
                if self._block is not None:
                    self._block.close()  # before, as both may not fit
                self._block = self._card.block(nbytes)

    @property
    def block(self) -> Block:
        """The memory."""
        assert self._block is not None
        return self._block


class Cards:
    """Lends one card to the components of a session; the last that returns it closes it."""

    def __init__(self, extra: str) -> None:
        self._extra, self._guard = extra, Lock()
        self._card: Card | None = None
        self._users = 0

    @contextmanager
    def lent(self) -> Iterator[Card]:
        """The card, current in this thread."""
        with self._guard:
            if self._card is None:
                self._card = Card(self._extra)
            card = self._card
            self._users += 1
        try:
            card.use()
            yield card
        finally:
            with self._guard:
                self._users -= 1
                if not self._users:
                    self._card = None
                    card.close()


def _cuda_core(extra: str) -> Any:
    with needing("cuda-core", extra, purpose="running a TensorRT engine"):
        module = import_module("cuda.core")
    return module
