"""How much memory and time an engine will take, before it is built or opened."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.bundle import Bundle
from toolkit.config import ModelConfig
from toolkit.cost import count, picture_axes
from toolkit.models import vlm
from toolkit.target import Target

_FUSED = ("causal_mask", "attention_cached")


@dataclass(frozen=True)
class Estimate:
    """Bytes by use. weights: as the target holds them; cache: the KV cache at full context."""

    weights_bytes: int
    cache_bytes: int
    activations_bytes: int
    context: int

    @property
    def total_bytes(self) -> int:
        """Everything that is held at once."""
        return self.weights_bytes + self.cache_bytes + self.activations_bytes


def estimate(bundle: Bundle, target: Target, context: int) -> Estimate:
    """Memory of an engine at a context length; activations for one picture and a full prompt.

    Activations: twice the inputs and outputs of the op that has most of them, which leaves room
    for the residual stream. Not known here, and not in it: what kernels allocate for themselves,
    and masks and scores of attention where a target has no kernel that does without them.
    """
    wide = target.backend in ("onnxruntime", "reference")
    size = 4 if wide or bundle.manifest.dtype == "fp32" else 2
    lm = bundle.model.lm.config
    cache = 2 * lm.depth * lm.kv_heads * lm.head_dim * context * size
    params = sum(c.params for c in bundle.manifest.components)
    return Estimate(params * size, cache, 2 * _largest(bundle.model, context) * size, context)


def _largest(model: ModelConfig, context: int) -> int:
    """Elements that an op reads and writes at most. Encoders see one view, the rest all views."""
    tiling = model.images.tiling
    points = tiling.pinpoints if tiling else ()
    views = 1 + max((w * h // tiling.tile**2 for w, h in points if tiling), default=0)
    axes = picture_axes(model, views, context) | {"context": context, "sequence": context}
    encoders = {f"encoder.{part.name}" for part in model.encoders}
    return max(
        cost.activation_elements
        for part in vlm.components(model)
        for cost in count(part, axes | {"tiles": 1} if part.name in encoders else axes).costs
        if cost.op not in _FUSED
    )
