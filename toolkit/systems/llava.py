"""LLaVA-1.5 (Liu et al., arXiv 2310.03744): CLIP's patch tokens through an MLP into Vicuna.

Reads haotian-liu/LLaVA's own layout and Hugging Face's LlavaForConditionalGeneration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from toolkit import models
from toolkit.config import ModelConfig, Part
from toolkit.errors import ConfigError
from toolkit.images import ImageRules, Preprocess
from toolkit.layouts import huggingface as hf
from toolkit.layouts import original
from toolkit.layouts.source import (
    Options,
    Source,
    check,
    check_tokenizer,
    read_eos,
    read_tokenizer,
    with_context,
)
from toolkit.models.encoders import clip
from toolkit.models.lms import llama, qwen2
from toolkit.models.mergers import mlp
from toolkit.prompts import PromptRules
from toolkit.strict import Reader
from toolkit.tokenizer import byte_tokenizer
from toolkit.weights import open_checkpoint

_TEMPLATES = {"llama": "vicuna_v1", "qwen2": "qwen_1_5"}


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this config.json is of this system."""
    if config.get("model_type") == "llava" and "text_config" in config:
        return True
    return original.claims(config)


def load(folder: Path, config: Mapping[str, Any], options: Options) -> Source:
    """Read a checkpoint folder of either layout."""
    return (_load_hf if "text_config" in config else _load_original)(folder, config, options)


def _load_original(folder: Path, config: Mapping[str, Any], options: Options) -> Source:
    r = Reader(config, str(folder / "config.json"), options.ignore_keys)
    lm = original.read_lm(r)
    name = r.take("mm_vision_tower", str)
    tower_folder = original.find_tower(name, folder, options)
    encoder, rule = original.read_tower(tower_folder, "clip", *original.read_taps(r), options)
    merger = original.read_projector(r, encoder.config.widths, lm.config.width)
    r.choice("mm_patch_merge_type", ["flat"], "flat")
    r.choice("mm_use_im_start_end", [False], False)
    aspect = r.choice("image_aspect_ratio", ["pad", "square"], "square")
    r.skip("image_grid_pinpoints", *original.TRAINING_KEYS)
    r.done()
    text, slow = read_tokenizer(folder, slow=True)
    rows = check_tokenizer(text, lm.config.vocab, str(folder))

    checkpoint = open_checkpoint(folder, options.torch_reader)
    lm_stored = original.lm_tensors(lm, checkpoint)
    merger_stored = original.projector_tensors(merger, checkpoint)
    tower_stored, spare = original.tower_tensors(encoder, tower_folder, options)
    check(
        [lm_stored, merger_stored],
        [*models.lm(lm.kind).unused(lm.config), f"{original.IN_CHECKPOINT}*"],
    )
    check([tower_stored], spare)
    lm, lm_table = original.shrink_vocab(lm, lm_stored.table, rows)
    weights = {
        "encoder.clip": tower_stored.weights(),
        "merger": merger_stored.weights(),
        "lm": type(lm_stored)(lm_table, lm_stored.shapes, checkpoint).weights(),
    }
    model = ModelConfig(
        folder.resolve().name,
        "llava",
        (encoder,),
        merger,
        with_context(lm, options.max_context),
        ImageRules({"clip": rule.padded() if aspect == "pad" else rule}),
        PromptRules(_TEMPLATES[lm.kind], "pieces", read_eos(folder, config), doubled_blank=slow),
    )
    return Source(model, weights, text, {"layout": "llava", "tower": name})


def _load_hf(folder: Path, config: Mapping[str, Any], options: Options) -> Source:
    r = Reader(config, str(folder / "config.json"), options.ignore_keys)
    lm, encoder = hf.read_lm(r), hf.read_tower(config, r, "clip", options)
    merger = hf.read_projector(r, encoder.config.widths, lm.config.width)
    r.skip(
        "image_token_index",
        "image_token_id",
        "image_seq_length",
        "ignore_index",
        "vocab_size",
        "tie_word_embeddings",
    )
    r.done()
    rule = hf.read_processor(folder, options)
    text, _ = read_tokenizer(folder, slow=False)
    check_tokenizer(text, lm.config.vocab, str(folder))

    checkpoint = open_checkpoint(folder, options.torch_reader)
    tower_file = models.encoder(encoder.kind)
    lm_stored = hf.lm_tensors(lm, checkpoint)
    tower_stored, prefix = hf.part_tensors(
        tower_file.names(encoder.config),
        tower_file.shapes(encoder.config),
        checkpoint,
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
    )
    merger_stored, _ = hf.part_tensors(
        hf.projector_names(merger.config),
        mlp.shapes(merger.config),
        checkpoint,
        "multi_modal_projector.",
        "model.multi_modal_projector.",
    )
    unused = [prefix + glob for glob in tower_file.unused(encoder.config)]
    unused += ["*" + glob for glob in models.lm(lm.kind).unused(lm.config)]
    check([lm_stored, tower_stored, merger_stored], unused)
    prompts = PromptRules(_TEMPLATES[lm.kind], "token", read_eos(folder, config["text_config"]))
    model = ModelConfig(
        folder.resolve().name,
        "llava",
        (encoder,),
        merger,
        with_context(lm, options.max_context),
        ImageRules({"clip": rule}),
        prompts,
    )
    weights = {
        "encoder.clip": tower_stored.weights(),
        "merger": merger_stored.weights(),
        "lm": lm_stored.weights(),
    }
    return Source(model, weights, text, {"layout": "huggingface"})


# -- presets ---------------------------------------------------------------------------------

CLIP_L_336 = clip.Config(width=1024, depth=24, heads=16, mlp=4096, patch=14, image=336, taps=(23,))
VICUNA_7B = llama.Config(
    width=4096, depth=32, heads=32, kv_heads=32, head_dim=128, mlp=11008, vocab=32000, context=4096
)
QWEN_0_5B = qwen2.Config(
    width=896,
    depth=24,
    heads=14,
    kv_heads=2,
    head_dim=64,
    mlp=4864,
    vocab=151936,
    context=32768,
    eps=1e-6,
    theta=1e6,
    qkv_bias=True,
    tied=True,
)
CLIP_PIXELS = Preprocess(
    "bicubic",
    1 / 255,
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
    short_edge=336,
    crop=(336, 336),
)


def _preset(name: str, kind: str, lm: llama.Config) -> ModelConfig:
    eos = {"llama": (2,), "qwen2": (151645,)}[kind]
    return ModelConfig(
        name,
        "llava",
        (Part("clip", "clip", CLIP_L_336),),
        Part("merger", "mlp", mlp.Config((1024,), lm.width)),
        Part("lm", kind, lm),
        ImageRules({"clip": CLIP_PIXELS.padded()}),
        PromptRules(_TEMPLATES[kind], "pieces", eos),
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "llava-1.5-7b": lambda: _preset("llava-1.5-7b", "llama", VICUNA_7B),
    "llava-qwen2-0.5b": lambda: _preset("llava-qwen2-0.5b", "qwen2", QWEN_0_5B),
}

_SPECIAL = {
    "llama": {"<unk>": 0, "<s>": 1, "</s>": 2},
    "qwen2": {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
}


def preset_tokenizer(model: ModelConfig) -> str:
    """Bytes and the special tokens at their published ids."""
    if model.lm.kind not in _SPECIAL:
        raise ConfigError(f"there is no preset tokenizer for {model.lm.kind}")
    return byte_tokenizer(_SPECIAL[model.lm.kind])
