"""The merge of levels: its attributes, how its kernel is launched, and what it must move."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.engines.plugins.compile import Launch
from edgevlm.engines.plugins.work import BYTES, Work, ceil_div, power_of_two

ROWS = 64


@dataclass(frozen=True)
class Attributes:
    """Those of the function edgevlm::LayerMerge; outputs: columns of its weight."""

    levels: int
    hidden_size: int
    epsilon: float
    outputs: int

    def columns(self, dtype: str) -> int:
        """Outputs of one program. fp32 has no tensor cores here, and registers for half as many."""
        return max(16, min(64 if dtype == "fp32" else 128, power_of_two(self.outputs)))

    def launch(self, dtype: str, *, widen: bool = False) -> Launch:
        """How the kernel is compiled.

        widen: multiply in float32 what was rounded to `dtype`, as the interpreter must.
        """
        return Launch(
            pointers=("x", "norm_weight", "norm_bias", "scale", "weight", "bias"),
            scalars=("tokens",),
            results=("y",),
            constants={
                "LEVELS": self.levels,
                "HIDDEN": self.hidden_size,
                "OUTPUTS": self.outputs,
                "EPSILON": self.epsilon,
                "ROWS": ROWS,
                "COLUMNS": self.columns(dtype),
                "WIDEN": widen,
                "DEPTH": max(16, min(32, power_of_two(self.hidden_size))),
            },
            formats={},
            warps=8,
        )

    def programs(self, tokens: int, dtype: str) -> int:
        """Programs of one launch; tokens: of all images together."""
        return ceil_div(tokens, ROWS) * ceil_div(self.outputs, self.columns(dtype))

    def work(self, tokens: int, dtype: str) -> Work:
        """Of `tokens` tokens in all, whose levels are tensors of their own at first.

        The builder joins and norms them in one kernel; a plugin gets them joined, by a copy.
        """
        size, width = BYTES[dtype], self.levels * self.hidden_size
        parameters = width * (self.outputs + 2) + self.levels * (self.outputs + 1)
        floor = size * (tokens * (width + self.outputs) + parameters)
        again = 2 * size * tokens * width  # written, and read again
        flops = tokens * width * (2 * self.outputs + 8)
        return Work(floor, flops, floor + again, 2, floor + again, 4)
