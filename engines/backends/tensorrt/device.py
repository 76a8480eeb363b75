"""The graphics card of this machine, as TensorRT's backend asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.toolkit.target import card

architecture = card.architecture


@dataclass(frozen=True)
class CardFacts:
    """name: as its vendor calls it. cuda: the newest CUDA that the driver knows, "13.0".

    memory_bytes: in all; shared: with the processor, as on Jetson.
    """

    name: str
    cuda: str
    memory_bytes: int
    shared: bool

    @property
    def workspace_bytes(self) -> int:
        """What a builder may take to try kernels out, beside the weights, which it holds twice."""
        return self.memory_bytes // (4 if self.shared else 2)


def facts(number: int = 0) -> CardFacts | None:
    """What a builder goes by; None without a driver or card."""
    name, cuda = card.name(number), card.driver_version()
    memory, shared = card.memory_bytes(number), card.shares_memory(number)
    if name is None or cuda is None or memory is None or shared is None:
        return None
    return CardFacts(name, cuda, memory, shared)
