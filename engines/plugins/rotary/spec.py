"""The rotation of MLCD's queries and keys: attributes, how its kernel is launched, its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.engines.plugins.compile import Launch
from edgevlm.engines.plugins.work import BYTES, Work, ceil_div, power_of_two


@dataclass(frozen=True)
class Attributes:
    """Those of the function edgevlm::RotateHeads: of edgevlm::RotaryAttention, without what
    attends.
    """

    num_heads: int
    head_dim: int

    def each(self) -> int:
        """Tokens of one program."""
        return max(1, min(16, 1024 // power_of_two(self.head_dim // 2)))

    def heads_each(self) -> int:
        """Heads of one program, for which it computes the cosines once."""
        return next(n for n in (4, 2, 1) if self.num_heads % n == 0)

    def launch(self, dtype: str) -> Launch:
        """How the kernel is compiled."""
        return Launch(
            pointers=("q", "k", "angles"),
            scalars=("tokens",),
            results=("q_rotated", "k_rotated"),
            constants={
                "HEADS": self.num_heads,
                "HEAD_DIM": self.head_dim,
                "TOKENS": self.each(),
                "HEADS_EACH": self.heads_each(),
                "CHANNELS": power_of_two(self.head_dim // 2),
            },
            formats={"angles": "fp32"},
            warps=4,
        )

    def programs(self, batch: int, tokens: int, dtype: str) -> int:
        """Programs of one launch, the same in all formats."""
        return batch * ceil_div(tokens, self.each()) * (self.num_heads // self.heads_each())

    def work(self, batch: int, tokens: int, dtype: str) -> Work:
        """Of `batch` images of `tokens` tokens each. The builder turns q in one kernel and k in
        another; only the angles are read twice.
        """
        values, angles = (
            batch * tokens * self.num_heads * self.head_dim,
            tokens * self.head_dim // 2,
        )
        floor = 4 * BYTES[dtype] * values + 4 * angles
        return Work(floor, 6 * values, floor, 1, floor + 4 * angles, 2)
