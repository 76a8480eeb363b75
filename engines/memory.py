"""How much memory and time an engine will take, before it is built or opened."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.bundle import Bundle
from toolkit.target import Target


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
    """Memory of an engine at a context length; activations for one picture and a full prompt."""
    wide = target.backend in ("onnxruntime", "reference")
    size = 4 if wide or bundle.manifest.dtype == "fp32" else 2
    lm = bundle.model.lm.config
    cache = 2 * lm.depth * lm.kv_heads * lm.head_dim * context * size
    params = sum(c.params for c in bundle.manifest.components)
    # The widest moment of a block holds its input, the normed input and both halves of the MLP.
    prompt = context * (2 * lm.width + 2 * lm.mlp) * size
    pictures = max(
        e.config.tokens * (2 * e.config.width + e.config.mlp) * size for e in bundle.model.encoders
    )
    return Estimate(params * size, cache, max(prompt, pictures), context)
