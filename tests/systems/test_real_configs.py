"""Configurations of published checkpoints at their real sizes, with tensors that take no memory.

Names and shapes of the tensors are those of transformers' modules on the meta device. The
structures of the published files stand here with their decisive keys; where the collection of
complete files is at hand, every one of them is read too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import CheckpointError, ConfigError, ToolkitError
from edgevlm.toolkit.images.preprocess import read_preprocess
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.strict import Reader, read_json
from edgevlm.toolkit.vlm import language_models
from tests.conftest import SHARED
from tests.systems import joined
from tests.systems.test_huggingface import TOKENIZER

hf: Any = joined.hf
FILES = SHARED / "cases/configs"
Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Zeros:
    """Stored tensors of these shapes, made when they are read."""

    shapes: Shapes

    def keys(self) -> Iterable[str]:
        return self.shapes

    def shape(self, key: str) -> tuple[int, ...]:
        return self.shapes[key]

    def read(self, key: str) -> Array:
        return np.broadcast_to(np.float32(0), self.shapes[key])


def reader(path: Path) -> Zeros:
    """The shapes that a test wrote in place of a torch file."""
    shapes = json.loads(path.read_text())
    return Zeros({key: tuple(shape) for key, shape in shapes.items()})


def write(folder: Path, config: Config, pixels: Config, shapes: Shapes) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    (folder / "pytorch_model.bin").write_text(json.dumps(shapes))


def shapes_of(model: Any, prefix: str = "") -> Shapes:
    return {prefix + key: tuple(t.shape) for key, t in model.state_dict().items()}


# -- towers, as their repositories describe them ---------------------------------------------------

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
          "num_hidden_layers": 24, "patch_size": 14}  # fmt: skip
_SO400M = {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
           "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}  # fmt: skip
CLIP = _LARGE | {"image_size": 336, "model_type": "clip_vision_model"}
SIGLIP = _SO400M | {"model_type": "siglip_vision_model"}
CONVNEXT = {"depths": [3, 3, 27, 3, 6], "hidden_sizes": [192, 384, 768, 1536, 3072],
            "image_size": 768, "model_type": "convnext", "num_stages": 5}  # fmt: skip
TOWERS: dict[str, Config] = {
    "openai/clip-vit-large-patch14-336": CLIP,
    "openai/clip-vit-large-patch14": CLIP | {"image_size": 224},
    "google/siglip-so400m-patch14-384": SIGLIP,
    "DeepGlint-AI/mlcd-vit-large-patch14-336": CLIP,
    "ConvLLaVA/ConvLLaVA-ConvNeXt-768": CONVNEXT,
}


def pixels(tower: Config) -> Config:
    """preprocessor_config.json for a tower."""
    side = tower["image_size"]
    edge = {"height": side, "width": side}
    if tower["model_type"].startswith("siglip"):
        return {"image_processor_type": "SiglipImageProcessor", "size": edge,
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    return {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side},
            "crop_size": edge, "image_mean": MEAN, "image_std": STD}  # fmt: skip


@functools.cache
def tower_shapes(name: str) -> Shapes:
    config = {k: v for k, v in TOWERS[name].items() if k != "model_type"}
    kind = TOWERS[name]["model_type"].split("_")[0]
    if kind == "convnext":
        config |= {"out_features": ["stage5"], "image_size": 768}
    classes = {"clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig),
               "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig),
               "convnext": (hf.ConvNextModel, hf.ConvNextConfig)}[kind]  # fmt: skip
    with torch.device("meta"):
        return shapes_of(classes[0](classes[1](**config)))


# -- whole folders ---------------------------------------------------------------------------------


def tokenizer(folder: Path, image_token: int | None) -> None:
    """A small tokenizer; `image_token` is the id of <image> in Hugging Face's layout."""
    data = json.loads((TOKENIZER / "tokenizer.json").read_text())
    if image_token is not None:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        data["model"]["vocab"]["<image>"] = image_token
        data["added_tokens"].append(
            {"id": image_token, "content": "<image>", **flags, "special": True}
        )
    (folder / "tokenizer.json").write_text(json.dumps(data))


def lm_shapes(kind: str, config: Config, prefix: str = "") -> Shapes:
    settings = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    settings = {k: v for k, v in settings.items() if not k.startswith(("mm_", "vision", "text"))}
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **settings))
    shapes = dict(shapes_of(model, prefix))
    if config.get("tie_word_embeddings"):
        del shapes[f"{prefix}lm_head.weight"]
    return shapes


def original(folder: Path, config: Config) -> None:
    """A folder of LLaVA's own layout, its tower beside it."""
    try:
        kind = language_models.kind_in_llava(config)
    except ConfigError:
        kind = "llama"
    shapes = dict(lm_shapes(kind, config))
    inputs, outputs = config["mm_hidden_size"], config["hidden_size"]
    layers = {"": (inputs, outputs)}
    if config.get("mm_projector_type", "linear") != "linear":
        layers = {"0.": (inputs, outputs), "2.": (outputs, outputs)}
    for name, (a, b) in layers.items():
        shapes |= {
            f"model.mm_projector.{name}weight": (b, a),
            f"model.mm_projector.{name}bias": (b,),
        }
    if "unpad" in (config.get("mm_patch_merge_type") or ""):
        shapes["model.image_newline"] = (outputs,)
    tower = TOWERS.get(config["mm_vision_tower"])
    if tower is not None:
        write(folder.parent / config["mm_vision_tower"], tower, pixels(tower),
              tower_shapes(config["mm_vision_tower"]))  # fmt: skip
    write(folder, config, {}, shapes)
    tokenizer(folder, None)


def huggingface(folder: Path, config: Config) -> None:
    """A folder of Hugging Face's layout."""
    text, vision = config["text_config"], config["vision_config"]
    shapes = dict(lm_shapes(text["model_type"], text, "language_model."))
    kind = vision["model_type"].split("_")[0]
    settings = {"clip": hf.CLIPVisionConfig, "siglip": hf.SiglipVisionConfig}[kind]
    model = {"clip": hf.CLIPVisionModel, "siglip": hf.SiglipVisionModel}[kind]
    own = {k: v for k, v in vision.items() if k not in ("model_type", "architectures")}
    with torch.device("meta"):
        tower = shapes_of(model(settings(**own)))
    shapes |= {f"vision_tower.vision_model.{key.removeprefix('vision_model.')}": shape
               for key, shape in tower.items()}  # fmt: skip
    a, b = vision["hidden_size"], text.get("hidden_size", 4096)
    for number, width in ((1, a), (2, b)):
        shapes[f"multi_modal_projector.linear_{number}.weight"] = (b, width)
        shapes[f"multi_modal_projector.linear_{number}.bias"] = (b,)
    if config["model_type"] != "llava":
        shapes["image_newline"] = (b,)
    write(folder, config, pixels(vision), shapes)
    tokenizer(folder, config.get("image_token_index", 32000))


def load(folder: Path, config: Config) -> Source:
    is_huggingface = "text_config" in config and any(
        str(name).endswith("ConditionalGeneration") for name in config["architectures"]
    )
    (huggingface if is_huggingface else original)(folder, config)
    return systems.load(folder, Options(torch_reader=reader))


# -- the structures of published files -------------------------------------------------------------

_QWEN = {
    "architectures": ["LlavaQwenForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
    "num_attention_heads": 14, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "vocab_size": 151936, "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "model_type": "llava_qwen",
    "mm_use_im_patch_token": False, "image_aspect_ratio": "pad",
}  # fmt: skip
_TILED = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
_GRIDS = {336: [[336, 672], [672, 336], [672, 672]], 384: [[384, 768], [768, 384], [768, 768]]}
_TEXT = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 32064,
         "num_attention_heads": 8, "num_hidden_layers": 2, "num_key_value_heads": 8,
         "max_position_embeddings": 4096}  # fmt: skip
_HF = {
    "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 32000,
    "model_type": "llava", "text_config": _TEXT, "vision_config": CLIP | {"projection_dim": 768},
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
}  # fmt: skip
_HF_NEXT = _HF | {
    "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
    "image_grid_pinpoints": _GRIDS[336],
}  # fmt: skip
_SIGLIP_TILED = _TILED | {
    "mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_hidden_size": 1152,
    "image_grid_pinpoints": _GRIDS[384],
}  # fmt: skip
_CLIP_TILED = _TILED | {"image_grid_pinpoints": _GRIDS[336]}

# name -> the configuration, and system, encoder and language model
READ: dict[str, tuple[Config, tuple[str, str, str]]] = {
    "MLCD-Embodied, tagged qwen2": (
        _QWEN | _CLIP_TILED | {"model_type": "qwen2", "mm_spatial_pool_mode": "bilinear",
                        "mm_vision_tower": "DeepGlint-AI/mlcd-vit-large-patch14-336"},
        ("mlcd", "clip", "qwen2"),
    ),
    "Aquila-VL, tagged qwen2": (
        _QWEN | _SIGLIP_TILED | {"model_type": "qwen2", "tie_word_embeddings": True,
                                 "image_aspect_ratio": "anyres_max_9"},
        ("llava_next", "siglip", "qwen2"),
    ),
    "a Mistral, tagged mistral": (
        _QWEN | {"architectures": ["LlavaMistralForCausalLM"], "model_type": "mistral",
                 "sliding_window": None, "max_window_layers": 21},
        ("llava", "clip", "mistral"),
    ),
    "a Llama, tagged llama": (
        _QWEN | {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llama",
                 "sliding_window": 4096, "use_sliding_window": False,
                 "layer_types": ["full_attention"] * 2},
        ("llava", "clip", "llama"),
    ),
    "LLaVA-NeXT-Video's keys": (
        _QWEN | _SIGLIP_TILED | {"mm_pooling_position": "after", "mm_newline_position": "grid",
                                 "mm_spatial_pool_stride": 2, "frames_upbound": 32},
        ("llava_next", "siglip", "qwen2"),
    ),
    "MMEvol": (
        _QWEN | _CLIP_TILED | {"architectures": ["LlavaQwen2ForCausalLM"],
                               "model_type": "llava_qwen2"},
        ("llava_next", "clip", "qwen2"),
    ),
    "llava-v1.5 with leftovers": (
        _QWEN | {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava",
                 "hidden_dropout": 0.0, "resid_pdrop": 0.1, "sep_image_conv_front": False,
                 "image_seq_length": 576, "use_mm2_proj": False, "quantization_config": None},
        ("llava", "clip", "llama"),
    ),
    "joycaption": (
        _HF | {"text_config": _TEXT | {"unsloth_version": "2024.9"}, "vision_config": SIGLIP,
               "vision_feature_select_strategy": "full", "image_seq_length": 729},
        ("llava", "siglip", "llama"),
    ),
    "a DPO run over Hugging Face's layout": (
        _HF_NEXT | _QWEN | {k: _HF_NEXT[k] for k in ("architectures", "model_type")}
        | {"unfreeze_mm_vision_tower": True, "tokenizer_padding_side": "left",
           "mm_resampler_type": None, "sliding_window": None},
        ("llava_next", "clip", "llama"),
    ),
    "tiles' keys of another class": (
        _HF | {"image_grid_pinpoints": None, "vision_aspect_ratio": "anyres_max_9",
               "video_token_index": 31999, "hidden_dropout": 0.1},
        ("llava", "clip", "llama"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_published_structures_are_read(name: str, tmp_path: Path) -> None:
    config, expected = READ[name]
    model = load(tmp_path / "folder", config).model
    assert (model.system, model.encoders[0].kind, model.lm.kind) == expected


def test_preprocessing_keys_in_a_towers_config_are_not_read(tmp_path: Path) -> None:
    original(tmp_path / "folder", _QWEN)
    path = tmp_path / "openai/clip-vit-large-patch14-336/config.json"
    stray = {"image_mean": [0, 0, 0], "crop_size": 9, "do_resize": False, "size": 3, "resample": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | stray))
    rules = systems.load(tmp_path / "folder", Options(torch_reader=reader)).model.images
    assert (rules.encoders["clip"].size, rules.encoders["clip"].mean[0]) == ((336, 336), MEAN[0])


# What changes a number for the class stays refused, and no hint advises to ignore it.
REFUSED: dict[str, tuple[Config, str]] = {
    "quantized": (_QWEN | {"quantization_config": {"quant_method": "hqq"}}, "quantization_config"),
    "multiscale": (_QWEN | {"s2": True}, "s2 = True"),
    "a second projector": (_QWEN | {"use_mm2_proj": True}, "use_mm2_proj = True"),
    "a dense connector": (_QWEN | {"mm_dense_connector_type": "sti"}, "mm_dense_connector_type"),
    "soft caps": (_QWEN | {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    "soft caps in text_config": (
        _HF | {"text_config": _TEXT | {"attn_logit_softcapping": 50.0}}, "attn_logit_softcapping"
    ),
    "a sliding Llama": (_HF | {"text_config": _TEXT | {"sliding_window": 4}}, "sliding_window = 4"),
    "a sliding Qwen2": (_QWEN | {"use_sliding_window": True}, "use_sliding_window = true"),
    "sliding layers": (
        _QWEN | {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"
    ),
    "a tower of FastVLM": (
        _QWEN | {"architectures": ["LlavaQwen2ForCausalLM"], "model_type": "llava_qwen2",
                 "mm_vision_tower": "mobileclip_l_1024"},
        "'mobileclip_l_1024' is MobileCLIP",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_a_number_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(ConfigError) as refused:
        load(tmp_path / "folder", config)
    assert reason in refused.value.message
    assert "--ignore-key" not in refused.value.hint


# -- the files themselves, where they are at hand --------------------------------------------------

REASONS = {
    "FastVLM-7B": "'mobileclip_l_1024' is MobileCLIP",
    "LLaVA-NeXT-Video-7B-hf": "'llava_next_video'.*is a model of videos",
}
SYSTEMS = {
    "Aquila-VL-2B-llava-qwen": ("llava_next", "siglip", "qwen2"),
    "ConvLLaVA-sft-768": ("convllava", "convnext", "llama"),
    "LLaVA-NeXT-Video-32B-Qwen": ("llava_next", "siglip", "qwen2"),
    "MLCD-Embodied-7B-as-tagged-qwen2": ("mlcd", "clip", "qwen2"),
    "MMEvol-Qwen2-7B": ("llava_next", "clip", "qwen2"),
    "llama-joycaption-alpha-two-hf-llava": ("llava", "siglip", "llama"),
    "llama3-llava-next-8b-hf": ("llava_next", "clip", "llama"),
    "llava-1.5-7b-hf": ("llava", "clip", "llama"),
    "llava-1.5-7b-hf-second": ("llava", "clip", "llama"),
    "llava-interleave-qwen-0.5b-hf": ("llava", "siglip", "qwen2"),
    "llava-next-interleave-qwen-0.5b": ("llava_next", "siglip", "qwen2"),
    "llava-onevision-qwen2-7b-ov": ("llava_next", "siglip", "qwen2"),
    "llava-onevision-qwen2-7b-ov-hf": ("llava_next", "siglip", "qwen2"),
    "llava-pretrain-vicuna-13b-v1.3": ("llava", "clip", "llama"),
    "llava-v1.5-7b": ("llava", "clip", "llama"),
    "llava-v1.5-13b": ("llava", "clip", "llama"),
    "llava-v1.6-34b-lora-finetune": ("llava", "clip", "llama"),
    "llava-v1.6-mistral-7b": ("llava_next", "clip", "mistral"),
    "llava-v1.6-mistral-7b-hf": ("llava_next", "clip", "mistral"),
    "llava-v1.6-mistral-7b-hf-DPO": ("llava_next", "clip", "mistral"),
    "llava-v1.6-mistral-lora-as-llama": ("llava", "clip", "llama"),
    "llava-v1.6-vicuna-13b-hf": ("llava_next", "clip", "llama"),
    "llava-v1.6-vicuna-7b": ("llava_next", "clip", "llama"),
}


def configs() -> list[str]:
    """Every config.json of a whole checkpoint in the collection, with those listed here."""
    other = ("generation-", "lm-", "preprocessor-", "processor-", "tower-")
    found = {path.stem for path in FILES.glob("*.json") if not path.name.startswith(other)}
    return sorted(found | set(SYSTEMS) | set(REASONS))


def file(name: str) -> Config:
    path = FILES / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not here (the collection is not part of the project)")
    return read_json(path)


@pytest.mark.parametrize("name", configs())
def test_every_published_file_is_read_or_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    config = file(name)
    if name in REASONS:
        with pytest.raises((ConfigError, CheckpointError), match=REASONS[name]) as refused:
            load(tmp_path / name, config)
        assert "--ignore-key" not in refused.value.hint
        return
    try:
        model = load(tmp_path / name, config).model
    except ToolkitError as refused_file:
        assert name not in SYSTEMS, refused_file
        assert "unknown keys" not in refused_file.message
        return
    found = (model.system, model.encoders[0].kind, model.lm.kind)
    assert found == SYSTEMS.get(name, found)
    stated = config.get("text_config", config)
    assert model.lm.config.num_layers == stated.get("num_hidden_layers", 32)
    assert model.lm.config.theta == stated.get("rope_theta", 10000.0)


@pytest.mark.parametrize("name", ["clip-336-old", "dinov2", "llava-1.5-7b-hf", "llava-pad-true",
                                  "llava-v1.6-mistral-7b-hf"])  # fmt: skip
def test_every_published_preprocessing_is_read(name: str) -> None:
    r = Reader(file(f"preprocessor-{name}"), name)
    assert read_preprocess(r).size in ((224, 224), (336, 336))
    r.done()
