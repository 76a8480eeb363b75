"""Mistral (Jiang et al., arXiv 2310.06825): Llama whose tokens may see a window only.

Source: Hugging Face's MistralForCausalLM; tensor names as there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgevlm.toolkit.models.lms import llama
from edgevlm.toolkit.models.lms.llama import hidden, logits, names, shapes, unused
from edgevlm.toolkit.strict import Reader

__all__ = ["Config", "hidden", "logits", "names", "shapes", "tiny", "unused"]


_DEFAULTS = {
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
}


@dataclass(frozen=True)
class Config(llama.Config):
    """Llama's fields; only `read` and `tiny` differ."""

    @classmethod
    def read(cls, r: Reader) -> Config:
        """From a MistralConfig; sliding_window null means every token sees all before it.

        A configuration without the key has the class's default window of 4096.
        """
        r.ignore("mistral")
        window = r.optional("sliding_window", int) if r.given("sliding_window") else 4096
        base = llama.read(
            r, qkv_bias=False, out_bias=False, mlp_bias=False, window=window, defaults=_DEFAULTS
        )
        return cls(**vars(base))


def tiny() -> Config:
    """A small instance for tests: a window shorter than the sequence."""
    return Config(**vars(replace(llama.tiny(), window=3)))
