"""`python -m benchmarks.compare_peers.make_model OUT`: the checkpoint that all programs read.

LLaVA of published shape with random weights in bfloat16 (seed 0): OUT/checkpoint; its language
model alone: OUT/lm; a prompt of 32 tokens and an image: OUT/prompt.txt, OUT/image.png.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.compare_peers.side import IMAGE_TOKENS, PIXELS, TEXT_TOKENS, image
from benchmarks.peers import SHAPE

transformers: Any = import_module("transformers")
# How Qwen2 splits text; llama.cpp has the same rule built in.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": PIXELS,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "crop_size": {"height": PIXELS, "width": PIXELS},
    "size": {"shortest_edge": PIXELS},
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
WORDS = "What is the name of the file that holds the values of this class, and which line reads it"


def tokenizer() -> Any:
    """Pairs of bytes, learnt from Python's own library."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train([str(p) for p in sorted(Path(os.__file__).parent.glob("*.py"))], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bare,
        additional_special_tokens=["<|im_start|>", "<image>"],
        model_max_length=SHAPE["max_position_embeddings"],
        **SPECIAL,
    )
    fast.chat_template = TEMPLATE
    return fast


def prompt(fast: Any) -> str:
    """A text of as many tokens as are asked for."""
    text = WORDS
    while len(fast(text)["input_ids"]) > TEXT_TOKENS:
        text = text.rsplit(" ", 1)[0]
    while len(fast(text)["input_ids"]) < TEXT_TOKENS:
        text += " a"
    return text


def configuration(fast: Any) -> Any:
    """Of the whole model."""
    ends = {"eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=transformers.Qwen2Config(**SHAPE | ends | {"bos_token_id": None}),
        image_token_index=fast.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )


def make(out: Path) -> None:
    """Write everything; the folder of the checkpoint last."""
    fast = tokenizer()
    config = configuration(fast)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    lm = transformers.Qwen2ForCausalLM(config.text_config)
    told = lm.model.load_state_dict(model.model.language_model.state_dict())
    assert not told.missing_keys and not told.unexpected_keys
    lm.tie_weights()
    ends = {"eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    for part, folder in ((lm, out / "lm"), (model, out / "checkpoint")):
        part.generation_config = transformers.GenerationConfig(**ends)
        part.save_pretrained(folder)
        fast.save_pretrained(folder)
    whole = out / "checkpoint"
    (whole / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
    (whole / "processor_config.json").write_text(json.dumps(PROCESSOR, indent=1))
    (out / "prompt.txt").write_text(prompt(fast))
    Image.fromarray(image(0)).save(out / "image.png")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
