"""More of Hugging Face's layout: models and processors of transformers, and their answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.systems import joined
from tests.systems.test_huggingface import CLIP, LLAMA, add_tokenizer, clip_processor, scatter

hf: Any = joined.hf
TEXT = LLAMA | {"max_position_embeddings": 2048, "num_hidden_layers": 2, "eos_token_id": 2}
HIGH, WIDE, SQUARE = (33, 120), (150, 40), (60, 60)
PINPOINTS = [[56, 56], [56, 112], [112, 112], [168, 112], [56, 224]]  # (height, width)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Variant:
    """One checkpoint. images: (width, height) of those in one question; split: the
    preprocessing in preprocessor_config.json, as transformers 4 saved it."""

    kind: str
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    lm: str = "llama"
    tower: str = "clip"
    images: tuple[tuple[int, int], ...] = (WIDE,)
    sharded: bool = False
    split: bool = False


LAST = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
TIED = {"tie_word_embeddings": True}
VARIANTS = {
    "llava, siglip, sharded": Variant(
        "llava", {"image_size": 60}, config=LAST, lm="qwen2", tower="siglip", sharded=True,
        images=(WIDE, HIGH),
    ),
    "llava, three levels, preprocessor_config": Variant(
        "llava", {"num_hidden_layers": 5}, {"head_dim": 12},
        {"vision_feature_layer": [-4, 2, -1]}, split=True, images=(HIGH,),
    ),
    "llava, all tokens of two levels": Variant(
        "llava", config={"vision_feature_layer": [1, -2], "vision_feature_select_strategy": "full"},
        text={"num_key_value_heads": 1, "rms_norm_eps": 1e-2}, images=(SQUARE, WIDE, HIGH),
    ),
    "llava, no projector bias, tied above": Variant(
        "llava", config={"multimodal_projector_bias": False} | TIED, lm="mistral",
        text={"sliding_window": 8, "rope_theta": 500.0},
    ),
    "llava, heads of 20 and 104": Variant(
        "llava", {"hidden_size": 208, "num_attention_heads": 2},
        {"hidden_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "next, other pinpoints, sharded": Variant(
        "next", config={"image_grid_pinpoints": PINPOINTS}, sharded=True, images=(WIDE, HIGH)
    ),
    "next, levels joined, preprocessor_config": Variant(
        "next", config={"vision_feature_layer": [-2, -1], "image_grid_pinpoints": PINPOINTS},
        lm="mistral", split=True, images=(HIGH,),
    ),
    "next, siglip, tied above": Variant(
        "next", config=LAST | TIED | {"image_grid_pinpoints": PINPOINTS}, tower="siglip",
        lm="qwen2", images=(HIGH, SQUARE),
    ),
    "next, mlcd, tied in the text's config": Variant(
        "next", text=TIED, config={"image_grid_pinpoints": PINPOINTS}, lm="qwen2", tower="mlcd"
    ),
    "onevision, tied, sharded": Variant(
        "onevision", {"patch_size": 8}, TIED, {"image_grid_pinpoints": PINPOINTS}, "qwen2",
        "siglip", sharded=True,
    ),
    "onevision, limit of two, preprocessor_config": Variant(
        "onevision", {"patch_size": 8},
        config={"image_grid_pinpoints": PINPOINTS, "vision_aspect_ratio": "anyres_max_2"},
        lm="qwen2", tower="siglip", split=True, images=(HIGH,),
    ),
    "onevision, three images": Variant(
        "onevision", config={"image_grid_pinpoints": PINPOINTS}, lm="qwen2", tower="siglip",
        images=(HIGH, WIDE, SQUARE),
    ),
}  # fmt: skip


def image_processor(v: Variant, size: int) -> Any:
    """The PIL processor that belongs to the class."""
    edge = {"height": size, "width": size}
    points = {"image_grid_pinpoints": v.config.get("image_grid_pinpoints")}
    if v.kind == "onevision":
        from transformers.models.llava_onevision import image_processing_pil_llava_onevision as o

        return o.LlavaOnevisionImageProcessorPil(size=edge, **points)
    if v.kind == "next":
        from transformers.models.llava_next import image_processing_pil_llava_next as n

        return n.LlavaNextImageProcessorPil(size={"shortest_edge": size}, crop_size=edge, **points)
    if v.tower == "siglip":
        from transformers.models.siglip import image_processing_pil_siglip as s

        return s.SiglipImageProcessorPil(size=edge, resample=3)
    return clip_processor(size)


def save(folder: Path, v: Variant) -> tuple[Any, Any]:
    """A random model and its processor, both saved by transformers."""
    torch.manual_seed(21)
    towers = {"clip": hf.CLIPVisionConfig, "siglip": hf.SiglipVisionConfig,
              "mlcd": hf.MLCDVisionConfig}  # fmt: skip
    vision = towers[v.tower](**(CLIP | v.vision))
    text = hf.AutoConfig.for_model(v.lm, **(TEXT | v.text))
    names = {"llava": "Llava", "next": "LlavaNext", "onevision": "LlavaOnevision"}
    name = names[v.kind]
    config = getattr(hf, f"{name}Config")(
        vision_config=vision, text_config=text, image_token_index=1000, **v.config
    )
    model = getattr(hf, f"{name}ForConditionalGeneration")(config).eval()
    scatter(model)
    model.save_pretrained(folder, max_shard_size="60KB" if v.sharded else "1GB")
    assert len(list(folder.glob("*.safetensors"))) > 2 or not v.sharded
    add_tokenizer(folder)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    images = image_processor(v, vision.image_size)
    # OneVision's class takes its tokens, and cannot be made without a video processor.
    classes = {"llava": hf.LlavaProcessor}
    processor = classes.get(v.kind, hf.LlavaNextProcessor)(
        image_processor=images,
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
        patch_size=vision.patch_size,
        num_additional_image_tokens=int(v.tower != "siglip"),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    (images if v.split else processor).save_pretrained(folder)
    add_tokenizer(folder)
    return model, processor


def inputs_of(v: Variant, model: Any, processor: Any, prompt: str, opened: list[Any]) -> Any:
    """What transformers makes of a question. OneVision: as many tokens as it has features."""
    if v.kind != "onevision":
        made = processor(images=opened, text=[prompt], return_tensors="pt")
        made.pop("token_type_ids", None)
        return made
    made = processor.image_processor([opened], return_tensors="pt")  # one question
    with torch.no_grad():
        features = model.model.get_image_features(**made)
    for rows in getattr(features, "pooler_output", features):
        prompt = prompt.replace("<image>", "<placed>" * len(rows), 1)
    text = processor.tokenizer(prompt.replace("<placed>", "<image>"), return_tensors="pt")
    return made | {key: text[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_ids(name: str, tmp_path: Path) -> None:
    v, folder = VARIANTS[name], tmp_path / "checkpoint"
    model, processor = save(folder, v)
    combined = json.loads((folder / "processor_config.json").read_text()) if not v.split else {}
    assert v.split == (folder / "preprocessor_config.json").exists()
    assert v.split != ("image_processor" in combined)
    files = [joined.image(tmp_path, *size, seed=n) for n, size in enumerate(v.images)]
    content = [{"type": "image"}] * len(files) + [{"type": "text", "text": "What is in the image?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    opened = [joined.shown(path) for path in files]
    inputs = inputs_of(v, model, processor, prompt, opened)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    expected = answer[0, inputs["input_ids"].shape[1] :].tolist()
    assert joined.answer_ids(joined.opened(folder), prompt, files, 16) == expected
    assert len(set(expected)) > 3
