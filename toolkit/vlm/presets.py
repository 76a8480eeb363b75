"""Published sizes of encoders and language models, and functions that make presets of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from edgevlm.toolkit.images.preprocess import ImageRules, Preprocess
from edgevlm.toolkit.models.encoders import clip, convnext, dinov2, mlcd
from edgevlm.toolkit.models.lms import llama, qwen2
from edgevlm.toolkit.text.prompts import PromptRules
from edgevlm.toolkit.text.tokenizer import byte_tokenizer
from edgevlm.toolkit.vlm import language_models
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig

CLIP_L_336 = clip.Config(
    hidden_size=1024,
    num_layers=24,
    num_heads=16,
    intermediate_size=4096,
    patch_size=14,
    image_size=336,
    taps=(23,),
)
DINOV2_L_336 = dinov2.Config(
    hidden_size=1024,
    num_layers=24,
    num_heads=16,
    intermediate_size=4096,
    patch_size=14,
    image_size=336,
    trained_image_size=518,
    taps=(24,),
)
CONVNEXT_L_5 = convnext.Config(depths=(3, 3, 27, 3, 6), dims=(192, 384, 768, 1536, 3072))
MLCD_BIGG_448 = mlcd.Config(
    hidden_size=1664,
    num_layers=48,
    num_heads=16,
    intermediate_size=8192,
    patch_size=14,
    image_size=(448, 448),
    taps=(47,),
)

VICUNA_7B = llama.Config(
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11008,
    vocab_size=32000,
    context=4096,
)
QWEN_7B = qwen2.Config(
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=18944,
    vocab_size=152064,
    context=32768,
    eps=1e-6,
    theta=1e6,
    qkv_bias=True,
)
QWEN_0_5B = qwen2.Config(
    hidden_size=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=4864,
    vocab_size=151936,
    context=32768,
    eps=1e-6,
    theta=1e6,
    qkv_bias=True,
    tied=True,
)

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def clip_pixels(side: int) -> Preprocess:
    """CLIP's preprocessing: short edge to `side` pixels, and a square crop of the centre."""
    mean, std = _CLIP_MEAN
    return Preprocess("bicubic", 1 / 255, mean, std, short_edge=side, crop=(side, side))


def unicom_pixels(side: int) -> Preprocess:
    """UNICOM's: torchvision's offsets of the crop, and RGB only behind it."""
    return replace(clip_pixels(side), rgb_last=True, half_even=True)


def imagenet_pixels(side: int) -> Preprocess:
    """The same with ImageNet's mean and deviation, which DINOv2 was trained with."""
    mean, std = _IMAGENET_MEAN
    return replace(clip_pixels(side), mean=mean, std=std)


def tapped(config: Any, *taps: int) -> Any:
    """The encoder configuration with other hidden states as outputs."""
    return replace(config, taps=taps)


Build = Callable[[llama.Config], ModelConfig]


def model(
    name: str,
    system: str,
    encoders: Sequence[ComponentConfig],
    merger: ComponentConfig,
    lm: llama.Config,
    images: ImageRules,
) -> ModelConfig:
    """A published model; the language model's kind follows from its configuration class."""
    row = language_models.row(language_models.kind_of(lm))
    prompts = PromptRules(row.template, "pieces", row.answer_ends)
    language_model = ComponentConfig("lm", row.kind, lm)
    return ModelConfig(name, system, tuple(encoders), merger, language_model, images, prompts)


def with_sibling(
    name: str, lm: llama.Config, build: Callable[[str, llama.Config], ModelConfig]
) -> dict[str, Callable[[], ModelConfig]]:
    """A preset, and its sibling for small devices: the same encoders with Qwen2.5-0.5B."""
    small = name.replace("-7b", "") + "-0.5b"
    return {name: lambda: build(name, lm), small: lambda: build(small, QWEN_0_5B)}


def tokenizer(model: ModelConfig) -> str:
    """A tokenizer of bytes and the special tokens at their published ids; presets have no other."""
    return byte_tokenizer(language_models.row(model.lm.kind).special_tokens)
