"""Every plugin, and where our presets use it: the shapes that floors and timings are stated for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from edgevlm.engines.plugins.compile import Compiled, Launch, compiled
from edgevlm.engines.plugins.layer_merge.spec import Attributes as LayerMerge
from edgevlm.engines.plugins.ms_deform_attn.spec import Attributes as MSDeformAttn
from edgevlm.engines.plugins.rotary.spec import Attributes as Rotary
from edgevlm.engines.plugins.work import Work

# The function whose calls each plugin is for; its folder's name.
FOLDERS = {
    "MSDeformAttn": "ms_deform_attn",
    "LayerMerge": "layer_merge",
    "RotaryAttention": "rotary",
}


@dataclass(frozen=True)
class Site:
    """One call in a preset, for one image. at: the attributes; sizes: of the call, as `work` takes
    them: images and queries, tokens, images and tokens.
    """

    name: str
    op: str
    at: MSDeformAttn | LayerMerge | Rotary
    sizes: tuple[int, ...]

    def work(self, dtype: str) -> Work:
        """What the call moves and computes."""
        count: Callable[..., Work] = self.at.work
        return count(*self.sizes, dtype)

    def programs(self, dtype: str) -> int:
        """Programs of one launch."""
        count: Callable[..., int] = self.at.programs
        return count(*self.sizes, dtype)

    @property
    def scalar(self) -> int:
        """The number that the kernel takes: queries, or tokens."""
        return self.sizes[-1]

    def launch(self, dtype: str) -> Launch:
        """How its kernel is compiled."""
        return self.at.launch(dtype)

    def compiled(self, dtype: str, sm: int) -> Compiled:
        """Its kernel for a card. Raises MissingExtra without Triton."""
        return compiled(self.kernel(), self.launch(dtype), dtype, sm)

    def kernel(self) -> Any:
        """The Triton kernel; this imports Triton, whose absence `compiled` explains."""
        folder = FOLDERS[self.op]
        try:
            module = import_module(f"edgevlm.engines.plugins.{folder}.kernel")
        except ModuleNotFoundError:
            return None
        return getattr(module, folder)


SITES = (
    Site("mmfuser, across levels", "MSDeformAttn", MSDeformAttn(16, 4, 64, 4, 24, 24), (1, 576)),
    Site("mmfuser, within a level", "MSDeformAttn", MSDeformAttn(16, 4, 64, 1, 24, 24), (1, 576)),
    Site("comm, CLIP", "LayerMerge", LayerMerge(24, 1024, 1e-5, 1024), (576,)),
    Site("comm, DINOv2", "LayerMerge", LayerMerge(6, 1024, 1e-5, 1024), (576,)),
    Site("mlcd-bigg-448", "RotaryAttention", Rotary(16, 104), (1, 1025)),
)
# Small shapes, some of odd sizes, for interpreters and quick answers.
SMALL = (
    Site("small deformable attention", "MSDeformAttn", MSDeformAttn(2, 2, 8, 3, 3, 4), (2, 6)),
    Site("one point, one level", "MSDeformAttn", MSDeformAttn(3, 1, 5, 1, 4, 4), (1, 19)),
    Site("small merge", "LayerMerge", LayerMerge(3, 40, 1e-5, 24), (10,)),
    Site("merge of thirty levels", "LayerMerge", LayerMerge(30, 16, 1e-5, 70), (3,)),
    Site("small rotation", "RotaryAttention", Rotary(2, 8), (2, 5)),
    Site("rotation of odd heads", "RotaryAttention", Rotary(5, 26), (1, 17)),
)
