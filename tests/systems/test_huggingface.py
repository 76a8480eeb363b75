"""Random tiny models saved by the installed transformers give transformers' own answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import ToolkitError
from edgevlm.toolkit.images import decode, preprocess
from tests.conftest import HERE
from tests.pipeline import ask, engine_of

IMAGE, TOKENIZER = (
    HERE / "goldens/e2e_llava15/image.png",
    HERE / "goldens/e2e_llava15/llava-v1.5-tiny",
)
PROMPT = "USER: <image>\nWhat is in the image? ASSISTANT:"

CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 56,
}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1001,
    "max_position_embeddings": 512,
}

# name -> (vision, text model type, text, LlavaConfig)
VARIANTS: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "grouped heads": (CLIP, "llama", LLAMA, {}),
    "heads of 12 channels": (CLIP, "llama", LLAMA | {"hidden_size": 48}, {}),
    "heads of 24 channels": (
        CLIP | {"hidden_act": "gelu"},
        "llama",
        LLAMA | {"head_dim": 24, "num_key_value_heads": 4},
        {"vision_feature_layer": -1},
    ),
    "class token kept": (CLIP, "llama", LLAMA, {"vision_feature_select_strategy": "full"}),
    "two levels joined": (CLIP, "llama", LLAMA, {"vision_feature_layer": [-2, -1]}),
    "qwen2 tied": (CLIP, "qwen2", LLAMA | {"tie_word_embeddings": True}, {}),
    "qwen2 untied": (CLIP, "qwen2", LLAMA, {}),
    "llama3 scaling": (
        CLIP,
        "llama",
        LLAMA
        | {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "attention_bias": True,
        },
        {},
    ),
    "linear scaling": (
        CLIP,
        "llama",
        LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "mlp_bias": True},
        {},
    ),
}


def save(folder: Path, name: str) -> Any:
    """Save the variant with its processor; returns the model."""
    vision, kind, text, options = VARIANTS[name]
    torch.manual_seed(3)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.AutoConfig.for_model(kind, **text),
        image_token_index=1000,
        **options,
    )
    model: Any = transformers.LlavaForConditionalGeneration(config)
    model.eval()
    scatter(model)
    model.save_pretrained(folder)
    size = vision["image_size"]
    processor = clip_processor(size)
    processor.save_pretrained(folder)
    add_tokenizer(folder)
    return model


def scatter(model: torch.nn.Module) -> None:
    """Parameters under which every component matters and answers vary."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, 0.2)


def clip_processor(size: int) -> Any:
    """The PIL processor of CLIP, which the original code used."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    edge = {"height": size, "width": size}
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=edge)


def add_tokenizer(folder: Path) -> None:
    """The golden Llama tokenizer with an <image> token, as converted checkpoints have it."""
    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append({"id": 1000, "content": "<image>", **flags, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(TOKENIZER / "tokenizer_config.json", folder)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer as transformers runs it."""
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_file=str(folder / "tokenizer.json"))


def expected_ids(model: Any, folder: Path, prompt: str, tokens: int) -> list[int]:
    """transformers' own greedy answer."""
    from PIL import Image

    pixels = clip_processor(model.config.vision_config.image_size)(
        Image.open(IMAGE).convert("RGB"), return_tensors="pt"
    )["pixel_values"]
    tokenizer = load_tokenizer(folder)
    features = (CLIP["image_size"] // CLIP["patch_size"]) ** 2
    features += model.config.vision_feature_select_strategy == "full"
    text = prompt.replace("<image>", "<image>" * features)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    found = model.generate(
        input_ids=ids,
        pixel_values=pixels,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
    )
    result: list[int] = found[0, ids.shape[1] :].tolist()
    return result


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_ids_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    model = save(folder, name)
    engine = engine_of(folder, tmp_path)
    expected = expected_ids(model, folder, PROMPT, 16)
    assert list(ask(engine, PROMPT, [IMAGE], 16).token_ids) == expected
    assert len(set(expected)) > 3  # a model that repeats one token would prove little


def test_text_alone_equals_that_of_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    model = save(folder, "qwen2 untied")
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer("USER: What is an image? ASSISTANT:")["input_ids"]])
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    answer = ask(engine_of(folder, tmp_path), "USER: What is an image? ASSISTANT:", [], 16)
    assert list(answer.token_ids) == expected
    assert answer.image_tokens == 0


def test_features_equal_those_of_transformers(tmp_path: Path) -> None:
    model = save(tmp_path / "checkpoint", "grouped heads")
    session = Session.open(engine_of(tmp_path / "checkpoint", tmp_path))
    image = decode.load(IMAGE)
    (rule,) = session.model.images.encoders.values()
    pixels = torch.from_numpy(preprocess.preprocess(image.rgb, rule)[None])
    with torch.no_grad():
        features = model.model.get_image_features(pixels)
    expected = getattr(features, "pooler_output", features)
    expected = torch.cat(list(expected)) if isinstance(expected, (list, tuple)) else expected
    from edgevlm.engines.runtime.clock import Clock

    found = session.vision.encode([image], Clock()).rows
    np.testing.assert_allclose(found, expected.reshape(found.shape).numpy(), atol=1e-4)


def test_names_of_the_second_generation_load_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "checkpoint"
    save(folder, "grouped heads")
    engine = engine_of(folder, tmp_path)
    before = ask(engine, PROMPT, [IMAGE], 8).token_ids
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for key, tensor in tensors.items():
        key = key.replace("language_model.model.", "model.language_model.")
        key = key.replace("language_model.lm_head", "lm_head")
        if key.startswith(("vision_tower", "multi_modal")):
            key = "model." + key
        renamed[key] = tensor
    save_file(renamed, folder / "model.safetensors")
    work = tmp_path / "again"
    work.mkdir()
    assert ask(engine_of(folder, work), PROMPT, [IMAGE], 8).token_ids == before


def test_config_json_tells_the_system(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint", "grouped heads")
    source = systems.load(tmp_path / "checkpoint", Options())
    assert (source.model.system, source.origin["layout"]) == ("llava", "huggingface")


ODD: list[tuple[str | None, str, Any, str]] = [
    (None, "text_config", None, "text_config is null"),
    (None, "vision_config", None, "vision_config is null"),
    (None, "vision_config", {}, "vision_config: model_type = None"),
    (None, "image_token_index", None, "image_token_index = None, expected the id"),
    (None, "vision_feature_layer", [], "vision_feature_layer = [] names no layer"),
    (None, "projector_hidden_act", None, "projector_hidden_act is null"),
    (None, "model_type", None, "the model_type is not that class's"),
    ("text_config", "hidden_size", None, "text_config: hidden_size is null"),
    ("text_config", "rms_norm_eps", None, "text_config: rms_norm_eps is null"),
    ("vision_config", "hidden_act", None, "vision_config: hidden_act is null"),
]


@pytest.mark.parametrize(("section", "key", "value", "reason"), ODD)
def test_null_and_empty_values_are_refused_with_their_key(
    section: str | None, key: str, value: Any, reason: str, tmp_path: Path
) -> None:
    save(tmp_path / "checkpoint", "grouped heads")
    path = tmp_path / "checkpoint/config.json"
    config = json.loads(path.read_text())
    config.pop("image_token_id", None)
    config.setdefault("image_token_index", 1000)
    (config if section is None else config[section])[key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ToolkitError) as refused:
        systems.load(tmp_path / "checkpoint", Options())
    assert reason in refused.value.message


def test_null_key_value_heads_are_one_per_head() -> None:
    from edgevlm.toolkit import models
    from edgevlm.toolkit.strict import Reader

    text = {**LLAMA, "num_key_value_heads": None}
    expected = transformers.AutoConfig.for_model("qwen2", **text).num_key_value_heads
    assert models.lm("qwen2").Config.read(Reader(text, "c")).num_kv_heads == expected == 4
