"""Other checkpoints in LLaVA's own layout: sizes, aspects, shards, projectors, folders.

The truth is put together from transformers' own modules, spliced as the original code splices.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from tests.pipeline import ask, engine_of
from tests.systems.test_huggingface import CLIP, IMAGE, LLAMA, TOKENIZER, clip_processor, scatter

PROMPT = "USER: <image>\nWhat is in the image?</s>USER: And now? ASSISTANT:"
MEAN = (122, 116, 104)


@dataclass(frozen=True)
class Variant:
    """One checkpoint. rows: embedding rows beyond the tokenizer's 1000. newline: it holds one."""

    vision: dict[str, Any]
    text: dict[str, Any]
    config: dict[str, Any]
    shards: int = 1
    tower_at: str = "beside"
    torch_files: bool = False
    rows: int = 0
    newline: bool = False


BASE = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "image_aspect_ratio": "pad",
    "mm_use_im_patch_token": False,
}
TEXT = LLAMA | {"vocab_size": 1000}

VARIANTS = {
    "pad": Variant(CLIP, TEXT, BASE),
    "square": Variant(CLIP, TEXT, BASE | {"image_aspect_ratio": "square"}),
    "aspect not given": Variant(CLIP, TEXT, BASE | {"image_aspect_ratio": None}),
    "linear projector": Variant(CLIP, TEXT, BASE | {"mm_projector_type": "linear"}),
    "identity projector": Variant(
        CLIP | {"hidden_size": 64}, TEXT, BASE | {"mm_projector_type": "identity"}
    ),
    "residual blocks": Variant(CLIP, TEXT, BASE | {"mm_projector_type": "mlp2x_res2x_gelu"}),
    "three linears": Variant(CLIP, TEXT, BASE | {"mm_projector_type": "mlp3x_gelu"}),
    "last layer, class token": Variant(
        CLIP, TEXT, BASE | {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}
    ),
    "layer as text": Variant(CLIP, TEXT, BASE | {"mm_vision_select_layer": "-2"}),
    "three shards, tower inside": Variant(CLIP, TEXT, BASE, shards=3, tower_at="inside"),
    "torch files": Variant(CLIP, TEXT, BASE, torch_files=True),
    "rows of tiles that never come": Variant(
        CLIP, TEXT, BASE | {"mm_patch_merge_type": "spatial_unpad"}, newline=True
    ),
    "padded embedding": Variant(CLIP, TEXT, BASE, rows=24),
    "other sizes": Variant(
        CLIP | {"patch_size": 8, "image_size": 64, "num_hidden_layers": 5, "hidden_act": "gelu"},
        TEXT | {"num_hidden_layers": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-5},
        BASE,
    ),
}


def modules(v: Variant) -> tuple[Any, Any, torch.nn.Module]:
    """Tower, language model and projector with random parameters."""
    torch.manual_seed(11)
    tower: Any = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**v.vision))
    text = v.text | {"vocab_size": 1000 + v.rows}
    lm: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text))
    projector = make_projector(v)
    for module in (tower, lm, projector):
        scatter(module.eval())
    return tower, lm, projector


class Residual(torch.nn.Module):
    """LLaVA's residual block: the norm precedes both the branch and the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pre_norm = torch.nn.LayerNorm(width)
        layers = torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, width)
        self.proj = torch.nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.pre_norm(x)
        branch: torch.Tensor = self.proj(normed)
        return normed + branch


def make_projector(v: Variant) -> torch.nn.Module:
    """The projector with the numbering of the original's Sequential."""
    name, width = v.config["mm_projector_type"], v.text["hidden_size"]
    if name == "identity":
        return torch.nn.Identity()
    count = 1 if name == "linear" else int(name[3])
    layers: list[torch.nn.Module] = []
    for i in range(count):
        inputs = width if i else v.vision["hidden_size"]
        layers += [torch.nn.GELU()] * bool(i) + [torch.nn.Linear(inputs, width)]
    layers += [Residual(width) for _ in range(int(name[9]) if "_res" in name else 0)]
    return layers[0] if count == 1 else torch.nn.Sequential(*layers)


def write(folder: Path, v: Variant, tower: Any, lm: Any, projector: torch.nn.Module) -> None:
    """The checkpoint on disk, as the original trainer writes it."""
    folder.mkdir(parents=True)
    tensors = {k: t for k, t in lm.state_dict().items() if "rotary" not in k}
    prefix = "model.mm_projector."
    tensors |= {prefix + k: t for k, t in projector.state_dict().items()}
    if v.newline:  # made for "unpad", used where images are lists of views only
        tensors["model.image_newline"] = torch.ones(v.text["hidden_size"])
    write_weights(folder, {k: t.contiguous() for k, t in tensors.items()}, v)
    path = folder.parent / "tower" if v.tower_at == "beside" else folder / "tower"
    tower.save_pretrained(path)
    clip_processor(v.vision["image_size"]).save_pretrained(path)
    config = lm.config.to_dict() | v.config
    config |= {"model_type": "llava_llama", "mm_vision_tower": "./tower"}
    config |= {"mm_hidden_size": v.vision["hidden_size"], "use_mm_proj": True}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer_config.json", "tokenizer.json"):
        shutil.copy(TOKENIZER / name, folder)


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], v: Variant) -> None:
    if v.torch_files:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    if v.shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = sorted(tensors)
    where: dict[str, str] = {}
    for number in range(v.shards):
        file = f"model-{number + 1:05d}-of-{v.shards:05d}.safetensors"
        mine = names[number :: v.shards]
        save_file({n: tensors[n] for n in mine}, folder / file)
        where |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def expected_ids(v: Variant, tower: Any, lm: Any, projector: Any, tokens: int) -> list[int]:
    """Greedy ids of the components joined by hand."""
    image = Image.open(IMAGE).convert("RGB")
    if v.config["image_aspect_ratio"] == "pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), MEAN)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    pixels = clip_processor(v.vision["image_size"])(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        chosen = states[int(v.config["mm_vision_select_layer"])]
        if v.config.get("mm_vision_select_feature") != "cls_patch":
            chosen = chosen[:, 1:]
        features = projector(chosen)[0]
        slow = sentencepiece_ids()
        embed = lm.get_input_embeddings()
        first, second = (embed(torch.tensor(ids)) for ids in slow)
        sequence = torch.cat([first, features, second])[None]
        lm.resize_token_embeddings(1000)
        found = lm.generate(
            inputs_embeds=sequence,
            attention_mask=torch.ones(sequence.shape[:2], dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
        )
    result: list[int] = found[0].tolist()
    return result


def sentencepiece_ids() -> tuple[list[int], list[int]]:
    """The prompt's two pieces, tokenized by sentencepiece itself as the slow tokenizer does."""
    import sentencepiece

    spm = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))
    before, after = PROMPT.split("<image>")
    turn, rest = after.split("</s>")
    # After a special token the slow tokenizer (legacy = false) adds no blank of its own.
    bare = spm.encode("x" + rest)[len(spm.encode("x")) :]
    return [1, *spm.encode(before)], [*spm.encode(turn), 2, *bare]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_ids(name: str, tmp_path: Path) -> None:
    v = VARIANTS[name]
    tower, lm, projector = modules(v)
    write(tmp_path / "llava-tiny", v, tower, lm, projector)
    engine = engine_of(tmp_path / "llava-tiny", tmp_path)
    expected = expected_ids(v, tower, lm, projector, 16)
    answer = ask(engine, PROMPT, [IMAGE], 16)
    assert list(answer.token_ids) == expected
    assert len(set(expected)) > 3
    assert np.isfinite(list(answer.timings_ms.values())).all()
