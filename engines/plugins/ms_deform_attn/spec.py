"""Deformable attention's attributes, how its kernel is launched, and what it must move."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.engines.plugins.compile import Launch
from edgevlm.engines.plugins.work import BYTES, Work, ceil_div, power_of_two


@dataclass(frozen=True)
class Attributes:
    """Those of the function edgevlm::MSDeformAttn."""

    num_heads: int
    num_points: int
    head_dim: int
    levels: int
    height: int
    width: int

    def each(self, dtype: str) -> int:
        """Queries of one program. fp32 takes twice the registers of a channel: half as many."""
        fits = 1024 // power_of_two(self.head_dim)
        return max(1, min(16, fits) // (2 if dtype == "fp32" else 1))

    def launch(self, dtype: str) -> Launch:
        """How the kernel is compiled."""
        return Launch(
            pointers=("value", "offsets", "scores", "reference"),
            scalars=("queries",),
            results=("y",),
            constants={
                "HEADS": self.num_heads,
                "POINTS": self.num_points,
                "HEAD_DIM": self.head_dim,
                "LEVELS": self.levels,
                "HEIGHT": self.height,
                "WIDTH": self.width,
                "QUERIES": self.each(dtype),
                "CHANNELS": power_of_two(self.head_dim),
                "SAMPLES": power_of_two(self.levels * self.num_points),
            },
            formats={"reference": "fp32"},
            warps=4,
        )

    def programs(self, batch: int, queries: int, dtype: str) -> int:
        """Programs of one launch."""
        return batch * ceil_div(queries, self.each(dtype)) * self.num_heads

    def work(self, batch: int, queries: int, dtype: str) -> Work:
        """Of `batch` images of `queries` queries each.

        The kernels that the builder makes hand each other the points; with several levels also
        the softmaxed scores, and the result before it is transposed.
        """
        size, values = BYTES[dtype], batch * queries * self.num_heads * self.head_dim
        samples = batch * queries * self.num_heads * self.levels * self.num_points
        cells = batch * self.levels * self.height * self.width * self.num_heads * self.head_dim
        floor = size * (cells + 3 * samples + values) + 8 * queries
        handed = 8 * samples
        if self.levels > 1:
            handed += 4 * samples + size * values
        flops = samples * (8 * self.head_dim + 20)
        kernels = 2 if self.levels == 1 else 4
        return Work(floor, flops, floor, 1, floor + 2 * handed, kernels)
