"""llava-hf's config files as published, with every key they carry, at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import ConfigError
from tests.systems import joined
from tests.systems.test_huggingface import CLIP, LLAMA, add_tokenizer, scatter

hf: Any = joined.hf
GRIDS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_VISION = CLIP | {"model_type": "clip_vision_model", "projection_dim": 768, "vocab_size": 32000}
_SIZES = {k: LLAMA[k] for k in LLAMA if k != "max_position_embeddings"}

LLAVA = {  # llava-hf/llava-1.5-7b-hf
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100,
    "image_token_index": 1000, "model_type": "llava", "pad_token_id": 32001,
    "projector_hidden_act": "gelu", "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0", "vision_config": _VISION, "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "vocab_size": 32064,
    "text_config": _SIZES | {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
    },
}  # fmt: skip
NEXT = LLAVA | {  # llava-hf/llava-v1.6-mistral-7b-hf
    "architectures": ["LlavaNextForConditionalGeneration"], "image_grid_pinpoints": GRIDS,
    "image_seq_length": 576, "model_type": "llava_next", "multimodal_projector_bias": True,
    "transformers_version": "4.39.0.dev0", "use_image_newline_parameter": True,
    "text_config": _SIZES | {
        "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
        "architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768,
        "model_type": "mistral", "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
ONEVISION = {  # llava-hf/llava-onevision-qwen2-0.5b-ov-hf
    "_name_or_path": "", "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "ignore_index": -100, "image_grid_pinpoints": GRIDS, "image_token_index": 1000,
    "model_type": "llava_onevision", "projector_hidden_act": "gelu",
    "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.45.0.dev0", "use_image_newline_parameter": True,
    "video_token_index": 999, "vision_aspect_ratio": "anyres_max_9",
    "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    "vision_config": CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False},
    "text_config": _SIZES | {
        "_name_or_path": "Qwen/Qwen2-0.5B-Instruct", "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643, "eos_token_id": 151645, "max_window_layers": 24,
        "model_type": "qwen2", "rope_theta": 1000000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
}  # fmt: skip
PIXELS = {
    "crop_size": {"height": 56, "width": 56}, "do_center_crop": True, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": MEAN,
    "image_processor_type": "CLIPImageProcessor", "image_std": STD,
    "processor_class": "LlavaProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 56},
}  # fmt: skip
NEXT_PIXELS = PIXELS | {
    "aspect_ratio_setting": "anyres", "do_pad": True, "image_grid_pinpoints": GRIDS,
    "image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor",
}  # fmt: skip
ONEVISION_PIXELS = {
    "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True,
    "do_resize": True, "image_grid_pinpoints": GRIDS, "image_mean": [0.5] * 3,
    "image_processor_type": "LlavaOnevisionImageProcessor", "image_std": [0.5] * 3,
    "processor_class": "LlavaOnevisionProcessor", "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"height": 56, "width": 56},
}  # fmt: skip
INTERLEAVE = {  # llava-hf/llava-interleave-qwen-0.5b-hf: one view of SigLIP
    **{k: v for k, v in ONEVISION.items() if not k.startswith(("video", "vision_aspect"))},
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
}  # fmt: skip
for _key in ("image_grid_pinpoints", "use_image_newline_parameter"):
    del INTERLEAVE[_key]
SIGLIP_PIXELS = {k: v for k, v in ONEVISION_PIXELS.items() if k not in ("do_pad",)} | {
    "image_processor_type": "SiglipImageProcessor", "processor_class": "LlavaProcessor",
}  # fmt: skip

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "llava-1.5-7b-hf": (LLAVA, PIXELS, "llava", "llama"),
    "llava-v1.6-mistral-7b-hf": (NEXT, NEXT_PIXELS, "llava_next", "mistral"),
    "llava-onevision-qwen2-0.5b-ov-hf": (ONEVISION, ONEVISION_PIXELS, "llava_next", "qwen2"),
    "llava-interleave-qwen-0.5b-hf": (INTERLEAVE, SIGLIP_PIXELS, "llava", "qwen2"),
}


def write(folder: Path, name: str) -> Any:
    """A model of the configuration's shapes with the published files around it; the model."""
    config, pixels, *_ = CASES[name]
    text = {k: v for k, v in config["text_config"].items() if k != "model_type"}
    vision = {k: v for k, v in config["vision_config"].items() if k in CLIP}
    towers = {"clip": hf.CLIPVisionConfig, "siglip": hf.SiglipVisionConfig}
    kind = config["vision_config"]["model_type"].split("_")[0]
    model_class = getattr(hf, config["architectures"][0])
    own = {k: config[k] for k in ("image_token_index", "vision_feature_layer",
                                  "vision_feature_select_strategy")}  # fmt: skip
    if "image_grid_pinpoints" in config:
        own["image_grid_pinpoints"] = GRIDS
    torch.manual_seed(4)
    text = {k: v for k, v in text.items() if k not in ("architectures", "_name_or_path")}
    settings = model_class.config_class(
        vision_config=towers[kind](**vision),
        text_config=hf.AutoConfig.for_model(config["text_config"]["model_type"], **text),
        **own,
    )
    model = model_class(settings).eval()
    scatter(model)
    model.save_pretrained(folder)
    add_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    processor = {"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14,
                 "processor_class": pixels["processor_class"],
                 "vision_feature_select_strategy": "default"}  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(processor))
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 151645],
                  "pad_token_id": 32001, "transformers_version": "4.36.0.dev0"}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return model


@pytest.mark.parametrize("name", CASES)
def test_configurations_are_read_as_published(name: str, tmp_path: Path) -> None:
    config, _, system, lm = CASES[name]
    model = write(tmp_path / name, name)
    source = systems.load(tmp_path / name, Options())
    assert (source.model.system, source.model.lm.kind) == (system, lm)
    assert source.model.prompts.eos == (2, 151645)
    text = config["text_config"]
    found = source.model.lm.config
    assert found.theta == text.get("rope_theta", 10000.0)
    assert found.tied == text.get("tie_word_embeddings", False)
    assert found.window is None
    assert (source.model.images.tiling is None) == ("image_grid_pinpoints" not in config)
    norm = model.get_submodule("model.language_model").norm.weight.detach().float().numpy()
    assert (source.weights["lm"]["norm.weight"] == norm).all()


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "projector_hidden_act", "relu"),
        ("config.json", "use_image_newline_parameter", False),
        ("config.json", "another_key", 1),
        ("preprocessor_config.json", "aspect_ratio_setting", "pad"),
        ("preprocessor_config.json", "do_resize", False),
        ("preprocessor_config.json", "size", {"longest_edge": 56}),
        ("preprocessor_config.json", "resample", 6),
    ],
)
def test_what_would_change_numbers_is_refused(
    file: str, key: str, value: Any, tmp_path: Path
) -> None:
    name = "llava-v1.6-mistral-7b-hf"
    write(tmp_path / name, name)
    path = tmp_path / name / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=key):
        systems.load(tmp_path / name, Options())


@pytest.mark.parametrize("pixels", ["preprocessor_config.json", "processor_config.json"])
def test_ignored_keys_are_ignored_in_either_file(pixels: str, tmp_path: Path) -> None:
    name = "llava-1.5-7b-hf"
    folder = tmp_path / name
    write(folder, name)
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"novelty": 1}
    (folder / "preprocessor_config.json").unlink()
    whole = settings if pixels.startswith("pre") else {"image_processor": settings}
    (folder / pixels).write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="novelty"):
        systems.load(folder, Options())
    assert systems.load(folder, Options(ignore_keys=("novelty",))).model.system == "llava"
