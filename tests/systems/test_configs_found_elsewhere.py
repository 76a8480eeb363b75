"""Configurations of further checkpoints, as public threads and other projects' tests quote them.

Each is read by the walk of test_real_configs.py, or refused with the reason that names it. Keys
that a base here has already are not repeated.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.toolkit.errors import ConfigError, ToolkitError
from tests.systems.test_real_configs import Config, load

_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_CLIP = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
    "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
    "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
# LLaVA-1.6 as PaddlePaddle/PaddleMIX's tests have it, with `pretrain_mm_mlp_adapter`.
_VICUNA_16 = {
    "_name_or_path": "./checkpoints/vicuna-7b-v1-6", "architectures": ["LlavaLlamaForCausalLM"],
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "hidden_act": "silu",
    "hidden_size": 4096, "image_aspect_ratio": "anyres", "image_crop_resolution": 224,
    "image_grid_pinpoints": _PINPOINTS, "image_split_resolution": 224, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "mm_hidden_size": 1024,
    "mm_patch_merge_type": "spatial_unpad", "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "pretrain_mm_mlp_adapter": None,
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_tower_lr": 2e-06,
    "model_type": "llava", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "tokenizer_model_max_length": 4096, "tokenizer_padding_side": "right",
    "transformers_version": "4.36.2", "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False, "unfreeze_mm_vision_tower": True, "use_cache": True,
    "use_mm_proj": True, "vocab_size": 32000,
}  # fmt: skip
_ONEVISION_7B = {
    "_name_or_path": "lmms-lab/llava-onevision-qwen2-7b-ov", "attention_dropout": 0.0,
    "architectures": ["LlavaQwenForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "image_aspect_ratio": "anyres_max_9",
    "image_crop_resolution": None, "image_split_resolution": None, "image_token_index": 151646,
    "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
    "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 32768,
    "max_window_layers": 28, "mm_hidden_size": 1152, "mm_newline_position": "one_token",
    "mm_patch_merge_type": "spatial_unpad", "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear", "mm_use_im_patch_token": False,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2, "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_vision_tower_lr": 2e-06, "model_type": "llava", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "pos_skipping_range": 4096,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "tokenizer_model_max_length": 32768, "tokenizer_padding_side": "right", "use_cache": True,
    "transformers_version": "4.40.0.dev0", "use_mm_proj": True, "use_pos_skipping": False,
    "use_sliding_window": False, "vision_tower_pretrained": None, "vocab_size": 152064,
}  # fmt: skip
_HF = {
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100,
    "image_token_index": 32000, "model_type": "llava", "pad_token_id": 32001,
    "projector_hidden_act": "gelu", "tie_word_embeddings": False, "torch_dtype": "float16",
    "vision_config": _CLIP, "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
        "torch_dtype": "float16", "vocab_size": 32064,
    },
}  # fmt: skip
# https://github.com/haotian-liu/LLaVA/issues/1378
_HF_16 = _HF | {
    "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
    "image_grid_pinpoints": _PINPOINTS, "use_image_newline_parameter": True, "vocab_size": 32064,
    "text_config": {
        "_name_or_path": "lmsys/vicuna-13b-v1.5", "architectures": ["LlamaForCausalLM"],
        "hidden_size": 5120, "intermediate_size": 13824, "max_length": 4096,
        "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 40,
        "num_hidden_layers": 40, "num_key_value_heads": 40, "pad_token_id": 0,
        "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
    },
}  # fmt: skip
_MISTRAL = {
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "sliding_window": None, "torch_dtype": "bfloat16", "vocab_size": 32064,
}  # fmt: skip
_VIDEO = {  # what transformers takes for a folder that says "llava", written back into the file
    "ignore_index": -100, "image_token_index": 32000, "projector_hidden_act": "gelu",
    "text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"},
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
}  # fmt: skip

# folder -> configuration; system, encoder and language model; layers, key-value heads, template
Found = tuple[Config, tuple[str, str, str], tuple[int, int, str]]
READ: dict[str, Found] = {
    "llava-v1.6-vicuna-7b": (_VICUNA_16, ("llava_next", "clip", "llama"), (32, 32, "vicuna_v1")),
    "llava-onevision-qwen2-7b-ov": (
        _ONEVISION_7B, ("llava_next", "siglip", "qwen2"), (28, 4, "qwen_1_5")
    ),
    "llava-next-interleave-qwen-0.5b": (  # PaddleMIX's tests: Qwen1.5, 24 layers, tied
        _ONEVISION_7B | {
            "hidden_size": 1024, "image_aspect_ratio": "anyres", "image_crop_resolution": 224,
            "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]],
            "image_split_resolution": 224, "intermediate_size": 2816, "max_window_layers": 21,
            "mm_vision_tower_lr": None, "model_type": "llava_qwen", "num_attention_heads": 16,
            "num_hidden_layers": 24, "num_key_value_heads": 16, "sliding_window": 32768,
            "tie_word_embeddings": True, "vocab_size": 151936,
        },
        ("llava_next", "siglip", "qwen2"), (24, 16, "qwen_1_5"),
    ),
    # https://github.com/LLaVA-VL/LLaVA-NeXT/issues/58: images as LLaVA-1.6, videos pooled
    "LLaVA-NeXT-Video-7B-DPO": (
        _VICUNA_16 | _VIDEO | {
            "_name_or_path": "model_zoo/LLM/vicuna/7B-V1.5", "freeze_mm_mlp_adapter": True,
            "mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "average",
            "mm_spatial_pool_out_channels": 1024, "mm_spatial_pool_stride": 2,
        },
        ("llava_next", "clip", "llama"), (32, 32, "vicuna_v1"),
    ),
    # https://github.com/haotian-liu/LLaVA/pull/1115: called Llama so that SGLang loads it
    "llava-v1.6-mistral-7b": (
        _VICUNA_16 | {
            "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_key_value_heads": 8, "rope_theta": 1000000.0,
            "sliding_window": None,
        },
        ("llava_next", "clip", "llama"), (32, 8, "mistral_instruct"),
    ),
    "llava-1.5-7b-hf": (_HF, ("llava", "clip", "llama"), (32, 32, "vicuna_v1")),
    "llava-v1.6-vicuna-13b-hf": (_HF_16, ("llava_next", "clip", "llama"), (40, 40, "vicuna_v1")),
    "llava-v1.6-mistral-7b-hf": (
        _HF_16 | {"text_config": _MISTRAL}, ("llava_next", "clip", "mistral"),
        (32, 8, "mistral_instruct"),
    ),
    "llava-llama-3-8b-v1_1-transformers": (
        _HF | {
            "image_token_index": 128257, "pad_token_id": 128258,
            "text_config": {
                "architectures": ["LlamaForCausalLM"], "bos_token_id": 128000,
                "eos_token_id": 128001, "intermediate_size": 14336,
                "max_position_embeddings": 8192, "model_type": "llama", "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128320,
            },
        },
        ("llava", "clip", "llama"), (32, 8, "llava_llama_3"),
    ),
    # LLaVAR (LLaVA-1 with <im_start> and <im_end>), and its config.json rewritten by hand for vLLM:
    # without image_token_index, which is then the class's 32000
    "llavar": (
        {key: value for key, value in _VICUNA_16.items() if key not in (
            "mm_projector_type", "mm_patch_merge_type", "image_aspect_ratio", "rope_theta",
            "num_key_value_heads", "image_grid_pinpoints", "mm_vision_select_feature")}
        | {"max_sequence_length": 2048, "sep_image_conv_front": False, "rms_norm_eps": 1e-06,
           "mm_use_im_start_end": True, "vocab_size": 32003, "_name_or_path": "./llavar"},
        ("llava", "clip", "llama"), (32, 32, "vicuna_v1"),
    ),
    "llavar-vllm": (
        {key: value for key, value in _HF.items() if key != "image_token_index"}
        | {"max_sequence_length": 2048, "mm_hidden_size": 1024, "mm_use_im_start_end": True,
           "mm_vision_tower": "openai/clip-vit-large-patch14-336", "use_mm_proj": True,
           "sep_image_conv_front": False, "freeze_mm_mlp_adapter": False,
           "initializer_range": 0.02, "tune_mm_mlp_adapter": False, "use_cache": True},
        ("llava", "clip", "llama"), (32, 32, "vicuna_v1"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_they_are_read(name: str, tmp_path: Path) -> None:
    config, kinds, (layers, heads, template) = READ[name]
    source = load(tmp_path / name, config)
    model = source.model
    assert (model.system, model.encoders[0].kind, model.lm.kind) == kinds
    assert (model.lm.config.num_layers, model.lm.config.num_kv_heads) == (layers, heads)
    assert model.prompts.template == template
    assert model.prompts.eos == (config.get("text_config", config).get("eos_token_id") or 2,)
    wrapped = bool(config.get("mm_use_im_start_end")) and "text_config" not in config
    assert model.prompts.image_text == ("<im_start><image><im_end>" if wrapped else "<image>")


REFUSED: dict[str, tuple[Config, str]] = {
    # https://github.com/huggingface/text-generation-inference/issues/3143
    "granite-vision-3.2-2b": (
        _HF_16 | {
            "vision_feature_layer": [-24, -20, -12, -1], "vision_feature_select_strategy": "full",
            "text_config": _MISTRAL | {
                "architectures": ["GraniteForCausalLM"], "model_type": "granite",
                "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
                "logits_scaling": 8.0, "residual_multiplier": 0.22,
            },
        },
        "text_config: model_type = 'granite' is not implemented",
    ),
    "LLaVA-NeXT-Video-7B-hf": (
        _HF_16 | {
            "architectures": ["LlavaNextVideoForConditionalGeneration"],
            "model_type": "llava_next_video", "spatial_pool_mode": "average",
            "spatial_pool_stride": 2, "video_seq_length": 288, "video_token_index": 32000,
        },
        "is a model of videos",
    ),
    "FastVLM-0.5B": (  # as converters for MLX write it
        _ONEVISION_7B | {
            "architectures": ["LlavaQwen2ForCausalLM"], "model_type": "llava_qwen2",
            "mm_vision_tower": "mobileclip_l_1024", "vision_config": {},
            "quantization": {"group_size": 64, "bits": 4},
        },
        "'mobileclip_l_1024' is MobileCLIP",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_they_are_refused_with_their_reason(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(ToolkitError) as refused:
        load(tmp_path / name, config)
    assert reason in refused.value.message
    assert "--ignore-key" not in refused.value.hint


def test_a_missing_image_token_is_its_classs(tmp_path: Path) -> None:
    """And null is none."""
    config = READ["llavar-vllm"][0]
    with pytest.raises(ConfigError, match="image_token_index = None"):
        load(tmp_path / "folder", config | {"image_token_index": None})
