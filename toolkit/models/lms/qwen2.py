"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and often one table for both ends.

Source: Hugging Face's Qwen2ForCausalLM; tensor names as there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.models.lms import llama
from edgevlm.toolkit.models.lms.llama import hidden, logits, names, shapes, unused
from edgevlm.toolkit.strict import Reader

__all__ = ["Config", "hidden", "logits", "names", "shapes", "tiny", "unused"]


_DEFAULTS = {
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}


@dataclass(frozen=True)
class Config(llama.Config):
    """Llama's fields; only `read` and `tiny` differ."""

    @classmethod
    def read(cls, r: Reader) -> Config:
        """From a Qwen2Config. Raises ConfigError for a sliding window, and what Llama refuses."""
        if r.take("use_sliding_window", bool, False):
            raise ConfigError(f"{r.where}: use_sliding_window = true is not implemented")
        r.ignore("qwen2")
        base = llama.read(r, qkv_bias=True, out_bias=False, mlp_bias=False, defaults=_DEFAULTS)
        return cls(**vars(base))


def tiny() -> Config:
    """A small instance for tests: biased, tied."""
    base = replace(llama.tiny(), qkv_bias=True, tied=True, theta=1e6)
    return Config(**vars(base))
