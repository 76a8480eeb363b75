"""What a fused op must move and compute, and what its body moves: the floor that times are held to.

Bytes count each tensor once: a value that is read again comes out of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Work:
    """One call.

    floor_bytes: inputs, parameters and outputs, once each; flops: multiplications and additions.
    plugin_bytes, plugin_kernels: with the plugin, and what is made for it alone. body_bytes,
    body_kernels: of the kernels that TensorRT-RTX 1.7 lists for the body in fp16 on sm_89, with
    what they hand each other.
    """

    floor_bytes: int
    flops: int
    plugin_bytes: int
    plugin_kernels: int
    body_bytes: int
    body_kernels: int

    @property
    def moves_less(self) -> bool:
        """Whether the plugin moves at least a tenth less than the body."""
        return 10 * self.plugin_bytes <= 9 * self.body_bytes

    def floor_s(self, bytes_s: float, flops_s: float) -> float:
        """The least time on a card that moves `bytes_s` and computes `flops_s` a second."""
        return max(self.floor_bytes / bytes_s, self.flops / flops_s)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()
