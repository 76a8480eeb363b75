"""Checkpoints in LLaVA's own layout, and the answer of their components joined by hand.

Parts are transformers' modules with random parameters; the joining follows the original loaders:
pieces of the prompt tokenized on their own, features between them, rows cut to the tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from edgevlm.engines.runtime.session import Question, Session
from tests.conftest import HERE
from tests.pipeline import engine_of
from tests.systems.test_huggingface import TOKENIZER, clip_processor, scatter

hf: Any = transformers
QWEN = HERE / "goldens/mlcd_llavanext_e2e"
MODEL_TYPES = {"llama": "llava_llama", "qwen2": "llava_qwen", "mistral": "llava_mistral"}
LM = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}
ASK = "USER: <image>\nWhat is in the image? ASSISTANT:"
ASK_QWEN = (
    "<|im_start|>user\n<image>\nWhat is in the image?<|im_end|>\n<|im_start|>assistant\n"
)  # fmt: skip


def language_model(kind: str = "llama", seed: int = 11, **changes: Any) -> Any:
    """A random causal model of transformers."""
    torch.manual_seed(seed)
    config = hf.AutoConfig.for_model(kind, **(LM | {"eos_token_id": 2} | changes))
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    scatter(model)
    return model


def linears(*widths: int, seed: int = 5) -> torch.nn.Sequential:
    """Linears with GELU between them, as in the original's Sequential."""
    torch.manual_seed(seed)
    layers: list[torch.nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [torch.nn.GELU()] * bool(i) + [torch.nn.Linear(inputs, outputs)]
    module = torch.nn.Sequential(*layers).eval()
    scatter(module)
    return module


def old_config(lm: Any) -> dict[str, Any]:
    """The model's config.json as transformers 4 wrote it: rope_theta and rope_scaling."""
    config: dict[str, Any] = lm.config.to_dict()
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config


def write(
    folder: Path,
    lm: Any,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    *,
    shards: int = 1,
    torch_files: bool = False,
) -> None:
    """The LLaVA folder. tensors: those besides the language model's, under their full names."""
    folder.mkdir(parents=True)
    kind = lm.config.model_type
    own = {k: t for k, t in lm.state_dict().items() if "rotary" not in k}
    if lm.config.tie_word_embeddings:
        del own["lm_head.weight"]
    shard(folder, own | tensors, shards, torch_files)
    whole = old_config(lm) | {"model_type": MODEL_TYPES[kind], "use_mm_proj": True}
    whole |= {"mm_use_im_patch_token": False, "mm_vision_select_layer": -2}
    (folder / "config.json").write_text(json.dumps(whole | config))
    if kind == "qwen2":
        names, origin = ["tokenizer.json", "tokenizer_config.json"], QWEN
    else:
        names, origin = ["tokenizer.model", "tokenizer_config.json"], TOKENIZER
    for name in names:
        shutil.copy(origin / name, folder)


def shard(folder: Path, tensors: dict[str, torch.Tensor], count: int, torch_files: bool) -> None:
    """All tensors in one file, or distributed over `count` files with an index."""
    save: Any = torch.save if torch_files else save_file
    stem, end = ("pytorch_model", "bin") if torch_files else ("model", "safetensors")
    tensors = {k: t.detach().clone().contiguous() for k, t in tensors.items()}
    if count == 1:
        save(tensors, folder / f"{stem}.{end}")
        return
    names, where = sorted(tensors), {}
    for number in range(count):
        file = f"{stem}-{number + 1:05d}-of-{count:05d}.{end}"
        mine = names[number::count]
        save({n: tensors[n] for n in mine}, folder / file)
        where.update(dict.fromkeys(mine, file))
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))


def below(prefix: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's tensors under `prefix`."""
    return {prefix + key: tensor for key, tensor in module.state_dict().items()}


def pieces(kind: str, prompt: str) -> list[list[int]]:
    """Ids of the texts around the images, by sentencepiece or by transformers' Qwen2."""
    texts = prompt.split("<image>")
    if kind == "qwen2":
        fast = hf.PreTrainedTokenizerFast(tokenizer_file=str(QWEN / "tokenizer.json"))
        return [fast(text)["input_ids"] for text in texts]
    import sentencepiece

    spm = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))
    found: list[list[int]] = [spm.encode(text) for text in texts]
    return [[1, *found[0]], *found[1:]]


def greedy(lm: Any, prompt: str, features: Sequence[torch.Tensor], tokens: int) -> list[int]:
    """The language model's own answer; features [T, width] of every image of the prompt."""
    embed, texts = lm.get_input_embeddings(), pieces(lm.config.model_type, prompt)
    embedded = [embed(torch.tensor(texts[0], dtype=torch.long))]
    for rows, text in zip(features, texts[1:], strict=True):
        embedded += [rows, embed(torch.tensor(text, dtype=torch.long))]
    whole = torch.cat(embedded)[None]
    if lm.config.vocab_size > 1000:  # ids that both tokenizers have
        lm.resize_token_embeddings(1000)
    with torch.no_grad():
        found = lm.generate(
            inputs_embeds=whole,
            attention_mask=torch.ones(whole.shape[:2], dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
        )
    generated: list[int] = found[0].tolist()
    assert len(set(generated)) > 3  # a model that repeats one token would prove little
    return generated


def opened(checkpoint: Path) -> Session:
    """A session of the checkpoint, through bundle and engine."""
    work = checkpoint.parent / "work"
    work.mkdir(exist_ok=True)
    return Session.open(engine_of(checkpoint, work))


def answer_ids(session: Session, prompt: str, files: Sequence[Path], tokens: int) -> list[int]:
    """The ids of our answer to a raw prompt."""
    return list(session.answer(Question(prompt, files, tokens, template="none")).token_ids)


def image(folder: Path, width: int, height: int, seed: int = 0) -> Path:
    """A file with coarse random colours and some noise."""
    g = np.random.default_rng(seed)
    coarse = Image.fromarray(g.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height))
    noise = g.integers(-20, 21, (height, width, 3))
    pixels = np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8)
    path = folder / f"{width}x{height}-{seed}.png"
    Image.fromarray(pixels).save(path)
    return path


def shown(path: Path) -> Any:
    """The image itself."""
    with Image.open(path) as file:
        return file.convert("RGB")


def padded(path: Path, colour: tuple[int, int, int] = (122, 116, 104)) -> Any:
    """The image on a square of its longer side, centred, the odd remainder below or right."""
    own = shown(path)
    side = max(own.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(own, ((side - own.width) // 2, (side - own.height) // 2))
    return square


def pixels(size: int, view: Any) -> torch.Tensor:
    """CLIP's pixels of one image [1, 3, size, size]."""
    found: torch.Tensor = clip_processor(size)(view, return_tensors="pt")["pixel_values"]
    return found
