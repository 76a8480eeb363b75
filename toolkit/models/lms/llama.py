"""Llama (Touvron et al., arXiv 2302.13971): RMSNorm, rotary attention, SwiGLU.

Vicuna is this. Qwen2 and Mistral are this with other switches; their files say which.
Tensor names on disk are those of Hugging Face's LlamaForCausalLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.models.recipes import Recipe, flip, keep
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Step, T, Weights, read_only
from edgevlm.toolkit.strict import MOST_LAYERS, Reader


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    linear divides every angle by `factor`; llama3 only the slow ones (Llama 3.1 release).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    trained_context: int = 8192


@dataclass(frozen=True)
class Config:
    """`context` is the longest sequence, the length of the rotary tables."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context: int
    eps: float = 1e-5
    theta: float = 10000.0
    scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    window: int | None = None

    @classmethod
    def read(cls, r: Reader) -> Config:
        """From a LlamaConfig."""
        r.ignore("llama")
        bias = r.take("attention_bias", bool, False)
        return read(r, qkv_bias=bias, out_bias=bias, mlp_bias=r.take("mlp_bias", bool, False))


LLAMA_DEFAULTS = {"intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048}


def read(
    r: Reader,
    *,
    qkv_bias: bool,
    out_bias: bool,
    mlp_bias: bool,
    window: int | None = None,
    defaults: Mapping[str, int] = LLAMA_DEFAULTS,
) -> Config:
    """The fields that Llama, Qwen2 and Mistral configurations share.

    `defaults`: what a missing key means, where the three disagree. Raises ConfigError.
    """
    r.choice("hidden_act", ["silu"], "silu", nullable=False)
    layers = r.take("layer_types", list, [])
    if any(layer != "full_attention" for layer in layers) and window is None:
        raise ConfigError(f"{r.where}: layer_types = {layers!r} is not implemented")
    hidden_size = r.count("hidden_size", 4096)
    num_heads, head_dim = _heads(r, hidden_size)
    theta, scaling = _read_rope(r)
    return Config(
        hidden_size=hidden_size,
        num_layers=r.count("num_hidden_layers", 32, most=MOST_LAYERS),
        num_heads=num_heads,
        num_kv_heads=r.share(
            "num_key_value_heads",
            num_heads,
            # null is one per attention head in all three; a missing key is not
            num_heads
            if r.given("num_key_value_heads")
            else defaults.get("num_key_value_heads", num_heads),
            nullable=True,
        ),
        head_dim=head_dim,
        intermediate_size=r.count("intermediate_size", defaults["intermediate_size"]),
        vocab_size=r.count("vocab_size", defaults["vocab_size"]),
        context=r.count("max_position_embeddings", defaults["max_position_embeddings"]),
        eps=r.positive("rms_norm_eps", 1e-6),
        theta=theta,
        scaling=scaling,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        tied=r.take("tie_word_embeddings", bool, False),
        window=window,
    )


def _heads(r: Reader, hidden_size: int) -> tuple[int, int]:
    """Attention heads and their channels, which rotate in pairs."""
    has_head_dim = r.has("head_dim")
    num_heads = (
        r.count("num_attention_heads", 32)
        if has_head_dim
        else r.share("num_attention_heads", hidden_size, 32)
    )
    head_dim = r.count("head_dim", hidden_size // num_heads, nullable=True)
    if head_dim % 2:
        raise ConfigError(f"{r.where}: heads of {head_dim} channels cannot be rotated in pairs")
    return num_heads, head_dim


def _read_rope(r: Reader) -> tuple[float, RopeScaling | None]:
    """rope_theta and rope_scaling (transformers 4), or rope_parameters holding both (5).

    As in transformers, an empty object is none, and rope_scaling replaces rope_parameters whole.
    """
    theta = r.positive("rope_theta", 10000.0)
    old, new = r.optional("rope_scaling", dict), r.optional("rope_parameters", dict)
    if not (new or old):
        return theta, None
    s = r.sub("rope_scaling" if old else "rope_parameters")
    theta = s.positive("rope_theta", theta)
    key = "rope_type" if s.has("rope_type") else "type"
    kind = s.choice(key, ["default", "linear", "llama3"], "default")
    s.skip("type", "rope_type")
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", s.positive("factor"))
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            s.positive("factor"),
            s.positive("low_freq_factor"),
            s.positive("high_freq_factor"),
            s.count("original_max_position_embeddings"),
        )
    s.done()
    return theta, scaling


def hidden(
    op: Ops[T],
    c: Config,
    w: Weights[T],
    inputs: Mapping[str, T],
    past: Sequence[tuple[T, T]],
) -> tuple[T, list[tuple[T, T]]]:
    """One call of the decoder without its output layer: a prompt, a piece of one, or one token.

    inputs: ids [B, S]; rows [B, S] and features [F, hidden_size] as in Ops.place_tokens; start
    [B], tokens already in the cache; score [B, P], the tokens whose states are computed (P may
    be 0). Returns their states behind the last norm [B, P, hidden_size], and the updated cache.
    """
    x = op.place_tokens(op.embed(inputs["ids"], w / "embed"), inputs["features"], inputs["rows"])
    positions = op.positions(inputs["ids"], inputs["start"])
    cos, sin = rotary_tables(c)
    step = Step(
        positions,
        op.causal_mask(positions, past[0][0], c.window),
        op.constant("rotary.cos", cos),
        op.constant("rotary.sin", sin),
    )
    present = []
    for i in range(c.num_layers):
        score = inputs["score"] if i + 1 == c.num_layers else None
        x, cache = op.block(_layer, w / f"layers.{i}", x, c, past[i], step, score)
        present.append(cache)
    return op.rms_norm(x, w / "norm", c.eps), present


def logits(op: Ops[T], c: Config, w: Weights[T], x: T) -> T:
    """The output layer: what `hidden` gave [B, P, hidden_size] -> [B, P, vocab]."""
    return op.unembed(x, w / "embed") if c.tied else op.linear(x, w / "head")


def _layer(
    op: Ops[T],
    w: Weights[T],
    x: T,
    c: Config,
    past: tuple[T, T],
    step: Step[T],
    score: T | None,
) -> tuple[T, tuple[T, T]]:
    """One layer. `score` in the last one: behind its attention only those tokens matter."""
    normed = op.rms_norm(x, w / "norm1", c.eps)
    mixed, cache = _attend(op, c, w / "attention", normed, past, step)
    if score is not None:
        mixed, x = (op.take(tokens, score) for tokens in (mixed, x))
    x = op.add(op.linear(mixed, w / "attention" / "out"), x)
    return op.add(_mlp(op, w / "mlp", op.rms_norm(x, w / "norm2", c.eps)), x), cache


def _attend(
    op: Ops[T], c: Config, w: Weights[T], x: T, past: tuple[T, T], step: Step[T]
) -> tuple[T, tuple[T, T]]:
    q, k, v = (op.linear(x, w / name) for name in ("q", "k", "v"))
    mixed, key, value = op.attention_cached(
        q,
        k,
        v,
        past,
        step,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        window=c.window,
    )
    return mixed, (key, value)


def _mlp(op: Ops[T], w: Weights[T], x: T) -> T:
    return op.linear(op.swiglu(op.linear(x, w / "gate"), op.linear(x, w / "up")), w / "down")


@lru_cache(maxsize=8)
def rotary_tables(c: Config) -> tuple[Array, Array]:
    """cos and sin of position * frequency, both [context, head_dim / 2] float32, read-only.

    frequency_k = theta^(-2k / head_dim) (Su et al., arXiv 2104.09864), stretched by `scaling`.
    """
    exponents = np.arange(0, c.head_dim, 2, dtype=np.float32) / np.float32(c.head_dim)
    frequencies = _stretch(1.0 / np.float32(c.theta) ** exponents, c.scaling)
    angles = np.outer(np.arange(c.context, dtype=np.float32), frequencies).astype(np.float32)
    return read_only(np.cos(angles)), read_only(np.sin(angles))


def _stretch(frequencies: Array, scaling: RopeScaling | None) -> Array:
    if scaling is None:
        return frequencies
    slow = np.asarray(frequencies / np.float32(scaling.factor))
    if scaling.kind == "linear":
        return slow
    wavelengths = 2 * math.pi / frequencies
    rotations = scaling.trained_context / wavelengths
    blend = np.clip((rotations - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return np.asarray((1 - blend) * slow + blend * frequencies, np.float32)


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Our tensors."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    tensors: dict[str, tuple[int, ...]] = {"embed.weight": (c.vocab_size, c.hidden_size)}
    for i in range(c.num_layers):
        linears = {
            "attention.q": (c.hidden_size, q, c.qkv_bias),
            "attention.k": (c.hidden_size, kv, c.qkv_bias),
            "attention.v": (c.hidden_size, kv, c.qkv_bias),
            "attention.out": (q, c.hidden_size, c.out_bias),
            "mlp.gate": (c.hidden_size, c.intermediate_size, c.mlp_bias),
            "mlp.up": (c.hidden_size, c.intermediate_size, c.mlp_bias),
            "mlp.down": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        }
        tensors |= {
            f"layers.{i}.norm1.weight": (c.hidden_size,),
            f"layers.{i}.norm2.weight": (c.hidden_size,),
        }
        for name, (inputs, outputs, bias) in linears.items():
            tensors[f"layers.{i}.{name}.weight"] = (inputs, outputs)
            if bias:
                tensors[f"layers.{i}.{name}.bias"] = (outputs,)
    tensors["norm.weight"] = (c.hidden_size,)
    if not c.tied:
        tensors["head.weight"] = (c.hidden_size, c.vocab_size)
    return tensors


_LAYER = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def names(c: Config) -> Mapping[str, Recipe]:
    """Where each of our tensors stands in a LlamaForCausalLM file."""
    table = {}
    fixed = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    for key in shapes(c):
        stem, leaf = key.rsplit(".", 1)
        if stem in fixed:
            source = fixed[stem]
        else:
            _, layer, module = stem.split(".", 2)
            source = f"model.layers.{layer}.{_LAYER[module]}"
        plain = leaf == "bias" or "norm" in stem or stem == "embed"
        table[key] = (keep if plain else flip)(f"{source}.{leaf}")
    return table


def unused(c: Config) -> tuple[str, ...]:
    """Globs of tensors that old files carry and nobody reads; a tied head is a copy."""
    return ("model.layers.*.self_attn.rotary_emb.inv_freq", *(("lm_head.weight",) * c.tied))


def tiny() -> Config:
    """A small instance for tests: grouped heads, a head size other than width / heads."""
    return Config(
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=80,
        vocab_size=96,
        context=32,
    )
