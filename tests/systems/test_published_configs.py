"""Complete config files as published, with all their keys, at tiny sizes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import ConfigError
from edgevlm.training.torch_files import reader
from tests.systems import joined

hf: Any = joined.hf
GRIDS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# -- towers --------------------------------------------------------------------------------------

_SIZES = {"hidden_size": 32, "image_size": 56, "intermediate_size": 64, "num_attention_heads": 4,
          "num_hidden_layers": 3, "patch_size": 14}  # fmt: skip
_GENERATION = {
    "add_cross_attention": False, "bad_words_ids": None, "bos_token_id": None,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
    "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": None,
    "exponential_decay_length_penalty": None, "finetuning_task": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False,
    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0,
    "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_beams": 1, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "pad_token_id": None, "prefix": None,
    "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False,
    "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False,
    "sep_token_id": None, "task_specific_params": None, "temperature": 1.0,
    "tf_legacy_loss": False, "tie_encoder_decoder": False, "tie_word_embeddings": True,
    "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": None,
    "torchscript": False, "transformers_version": "4.21.3", "typical_p": 1.0,
    "use_bfloat16": False,
}  # fmt: skip
CLIP_336 = {  # openai/clip-vit-large-patch14-336: both towers in one file
    "_commit_hash": None, "_name_or_path": "", "architectures": ["CLIPModel"],
    "initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "model_type": "clip",
    "projection_dim": 768, "text_config": {"hidden_size": 768, "model_type": "clip_text_model"},
    "text_config_dict": {"hidden_size": 768}, "torch_dtype": "float32",
    "transformers_version": None,
    "vision_config": _GENERATION | _SIZES | {
        "_name_or_path": "", "architectures": None, "attention_dropout": 0.0, "dropout": 0.0,
        "hidden_act": "quick_gelu", "initializer_factor": 1.0, "initializer_range": 0.02,
        "layer_norm_eps": 1e-05, "model_type": "clip_vision_model", "num_channels": 3,
        "projection_dim": 768,
    },
    "vision_config_dict": _SIZES | {"projection_dim": 768},
}  # fmt: skip
CLIP_336_PIXELS = {
    "crop_size": 56, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": MEAN, "image_std": STD,
    "resample": 3, "size": 56,
}  # fmt: skip
MLCD_336 = _SIZES | {  # DeepGlint-AI/mlcd-vit-large-patch14-336
    "_name_or_path": "", "architectures": ["CLIPVisionModel"], "attention_dropout": 0.0,
    "dropout": 0.0, "hidden_act": "quick_gelu", "initializer_factor": 1.0,
    "initializer_range": 0.02, "layer_norm_eps": 1e-05, "model_type": "clip_vision_model",
    "num_channels": 3, "projection_dim": 1024, "torch_dtype": "float32",
    "transformers_version": "4.44.0",
}  # fmt: skip
NEW_PIXELS = {
    "crop_size": {"height": 56, "width": 56}, "do_center_crop": True, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": MEAN,
    "image_processor_type": "CLIPImageProcessor", "image_std": STD, "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 56},
}  # fmt: skip
SIGLIP_384 = {  # google/siglip-so400m-patch14-384
    "architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip",
    "text_config": {"hidden_size": 1152, "model_type": "siglip_text_model"},
    "torch_dtype": "float32", "transformers_version": "4.37.0.dev0",
    "vision_config": _SIZES | {"model_type": "siglip_vision_model"},
}  # fmt: skip
SIGLIP_PIXELS = {
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3,
    "image_processor_type": "SiglipImageProcessor", "image_std": [0.5] * 3,
    "processor_class": "SiglipProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"height": 56, "width": 56},
}  # fmt: skip
CONVNEXT = {  # a five-stage tower as ConvLLaVA's trainer writes it
    "_name_or_path": "", "architectures": ["ConvNextModel"], "depths": [1, 1, 1, 1, 1],
    "drop_path_rate": 0.0, "hidden_act": "gelu", "hidden_sizes": [4, 8, 12, 16, 32],
    "image_size": 1536, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
    "layer_scale_init_value": 1e-06, "model_type": "convnext", "num_channels": 3,
    "num_stages": 5, "out_features": ["stage5"], "out_indices": [5], "patch_size": 4,
    "stage_names": ["stem", "stage1", "stage2", "stage3", "stage4", "stage5"],
    "torch_dtype": "float32", "transformers_version": "4.39.3",
}  # fmt: skip

# -- language models -------------------------------------------------------------------------------

_LM = {
    "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 80,
    "num_attention_heads": 4, "num_hidden_layers": 2, "use_cache": True, "vocab_size": 1000,
}  # fmt: skip
_MM = {
    "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2, "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False,
    "use_mm_proj": True,
}  # fmt: skip
_TILES = {
    "image_aspect_ratio": "anyres", "image_crop_resolution": 224, "image_grid_pinpoints": GRIDS,
    "image_split_resolution": 224, "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None, "mm_vision_tower_lr": 2e-06, "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right", "unfreeze_mm_vision_tower": True,
}  # fmt: skip
_VICUNA = _LM | {
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096,
    "num_key_value_heads": 4, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
_QWEN = _LM | {
    "attention_dropout": 0.0, "bos_token_id": 997, "eos_token_id": 999,
    "max_position_embeddings": 32768, "max_window_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16", "use_sliding_window": False,
}  # fmt: skip
_NEXT = {
    "add_faster_video": False, "faster_token_stride": 10, "force_sample": False,
    "image_crop_resolution": None, "image_split_resolution": None,
    "mm_newline_position": "one_token", "mm_patch_merge_type": "spatial_unpad",
    "mm_spatial_pool_mode": "bilinear", "mm_spatial_pool_stride": None,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_vision_tower_lr": 2e-06, "pos_skipping_range": 4096, "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right", "use_pos_skipping": False, "vision_tower_pretrained": None,
}  # fmt: skip
LLAVA_15 = _VICUNA | _MM | {  # liuhaotian/llava-v1.5-7b
    "_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"],
    "image_aspect_ratio": "pad", "max_length": 4096, "model_type": "llava",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "transformers_version": "4.31.0",
    "unfreeze_mm_vision_tower": False,
}  # fmt: skip
LLAVA_16_VICUNA = _VICUNA | _MM | _TILES | {  # liuhaotian/llava-v1.6-vicuna-7b
    "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlavaLlamaForCausalLM"],
    "attention_bias": False, "attention_dropout": 0.0, "max_length": 4096,
    "model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version": "4.36.2",
}  # fmt: skip
LLAVA_16_MISTRAL = LLAVA_16_VICUNA | {  # liuhaotian/llava-v1.6-mistral-7b
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "num_key_value_heads": 2,
    "architectures": ["LlavaMistralForCausalLM"], "max_position_embeddings": 32768,
    "model_type": "llava_mistral", "rope_theta": 1000000.0, "sliding_window": None,
}  # fmt: skip
ONEVISION = _QWEN | _MM | _NEXT | {  # lmms-lab/llava-onevision-qwen2-0.5b-ov
    "_name_or_path": "", "architectures": ["LlavaQwenForCausalLM"], "ignore_index": -100,
    "image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": GRIDS,
    "image_token_index": 998, "mm_projector_lr": None, "model_type": "llava",
    "mm_vision_tower": "google/siglip-so400m-patch14-384", "projector_hidden_act": "gelu",
    "sliding_window": 32768, "tie_word_embeddings": True, "transformers_version": "4.40.0.dev0",
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"},
}  # fmt: skip
EMBODIED = _QWEN | _MM | _NEXT | {  # DeepGlint-AI/MLCD-Embodied-7B
    "_name_or_path": "", "architectures": ["LlavaQwenForCausalLM"],
    "image_aspect_ratio": "anyres", "model_type": "llava_qwen", "sliding_window": 131072,
    "image_grid_pinpoints": [[56 * i, 56 * j] for i in range(1, 7) for j in range(1, 7)],
    "mm_projector_lr": None, "mm_vision_tower": "DeepGlint-AI/mlcd-vit-large-patch14-336",
    "tie_word_embeddings": False, "transformers_version": "4.44.0", "use_mrope": False,
}  # fmt: skip
SFT_1536 = _VICUNA | _MM | {  # ConvLLaVA-sft-1536
    "_name_or_path": "", "architectures": ["LlavaLlamaForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "image_aspect_ratio": "pad", "image_grid_pinpoints": None,
    "max_length": 4096, "mm_patch_merge_type": "flat", "mm_projector_lr": None,
    "mm_vision_select_layer": -1, "mm_vision_tower": "ConvLLaVA/ConvLLaVA-ConvNeXt-1536",
    "model_type": "llava_llama", "rope_theta": 10000.0, "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right", "transformers_version": "4.39.3",
    "tune_entire_model": False, "tune_vision_tower": False, "vision_tower_lr": None,
}  # fmt: skip

Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, str, str]
ORIGINALS: dict[str, Case] = {
    "llava-v1.5-7b": (LLAVA_15, CLIP_336, CLIP_336_PIXELS, "llava", "clip", "llama"),
    "llava-v1.6-vicuna-7b": (
        LLAVA_16_VICUNA, CLIP_336, CLIP_336_PIXELS, "llava_next", "clip", "llama"
    ),
    "llava-v1.6-mistral-7b": (
        LLAVA_16_MISTRAL, CLIP_336, CLIP_336_PIXELS, "llava_next", "clip", "mistral"
    ),
    "llava-onevision-qwen2-0.5b-ov": (
        ONEVISION, SIGLIP_384, SIGLIP_PIXELS, "llava_next", "siglip", "qwen2"
    ),
    "MLCD-Embodied-7B": (EMBODIED, MLCD_336, NEW_PIXELS, "mlcd", "clip", "qwen2"),
    "ConvLLaVA-sft-1536": (SFT_1536, CONVNEXT, NEW_PIXELS, "convllava", "convnext", "llama"),
}  # fmt: skip


def tower_module(kind: str, config: dict[str, Any]) -> Any:
    sizes = config.get("vision_config", config)
    if kind == "convnext":
        own = {k: config[k] for k in ("depths", "hidden_sizes", "num_stages", "out_features")}
        return hf.ConvNextModel(hf.ConvNextConfig(**own))
    model, settings = {
        "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig),
        "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig),
    }[kind]
    return model(settings(**{key: sizes[key] for key in _SIZES}))


def write_original(work: Path, name: str, **changes: Any) -> Path:
    """The checkpoint as published: tower from the hub beside it, with its text tower's tensors."""
    published, tower_config, pixels, _, kind, lm_kind = ORIGINALS[name]
    config = published | changes
    own = {k: config[k] for k in (*_LM, "num_key_value_heads", "tie_word_embeddings")}
    lm = joined.language_model(lm_kind, **own)
    tensors = joined.below("model.mm_projector.", joined.linears(32, 48, 48))
    tower = tower_module(kind, tower_config)
    if "unpad" in config.get("mm_patch_merge_type", ""):
        tensors["model.image_newline"] = torch.zeros(48)
        tensors |= joined.below("model.vision_tower.vision_tower.vision_model.", tower)
    folder, tower_folder = work / name, work / str(config["mm_vision_tower"])
    joined.write(folder, lm, tensors, {}, shards=2)
    (folder / "config.json").write_text(json.dumps(config))
    tower_folder.mkdir(parents=True)
    (tower_folder / "config.json").write_text(json.dumps(tower_config))
    (tower_folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    prefix = "" if kind == "convnext" else "vision_model."
    whole = joined.below(prefix, tower)
    if tower_config["model_type"] in ("clip", "siglip"):
        whole |= {"logit_scale": torch.zeros(()), "text_model.final_layer_norm.bias": torch.ones(3),
                  "text_projection.weight": torch.ones(3, 3),
                  "visual_projection.weight": torch.ones(3, 3),
                  "vision_model.embeddings.position_ids": torch.arange(17)[None]}  # fmt: skip
    torch.save(whole, tower_folder / "pytorch_model.bin")
    return folder


def load(folder: Path) -> Source:
    return systems.load(folder, Options(torch_reader=reader()))


@pytest.mark.parametrize("name", ORIGINALS)
def test_original_configurations_are_read_as_published(name: str, tmp_path: Path) -> None:
    config, *_, system, tower, lm = ORIGINALS[name]
    folder = write_original(tmp_path, name)
    model = load(folder).model
    assert (model.system, model.encoders[0].kind, model.lm.kind) == (system, tower, lm)
    assert model.lm.config.theta == config.get("rope_theta", 10000.0)
    assert (model.lm.config.eps, model.lm.config.tied) == (
        config["rms_norm_eps"], config["tie_word_embeddings"]
    )  # fmt: skip
    assert model.prompts.eos == (config["eos_token_id"],)
    assert (model.images.tiling is not None) == ("image_crop_resolution" in config)


# -- other files of a checkpoint, and other written forms ----------------------------------------


def beside(folder: Path) -> None:
    """Files of a training run, and an older copy of the weights in torch's format."""
    with (folder / "training_args.bin").open("wb") as file:
        pickle.dump({"lr": 1}, file)
    for name in ("optimizer.bin", "scheduler.pt", "mm_projector.bin", "rng_state.pth"):
        torch.save({"step": torch.ones(1)}, folder / name)
    torch.save({"model.norm.weight": torch.zeros(3)}, folder / "pytorch_model.bin")
    (folder / "trainer_state.json").write_text("{}")


def stale_index(folder: Path) -> None:
    """One complete file, and an index of shards that do not exist: transformers reads the file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("model-*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


def changed(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


FINE: dict[str, Callable[[Path], None]] = {
    "files beside": beside,
    "a stale index": stale_index,
    "training in pieces": changed(pretraining_tp=2),
    "flash attention": changed(_flash_attn_2_enabled=True, attn_implementation="eager"),
    "multiscale off": changed(s2=False),
    "a resampler that is never applied": changed(
        mm_resampler_type="perceiver", mm_perceiver_depth=3, mm_perceiver_latents=32
    ),
}


@pytest.mark.parametrize("way", FINE)
def test_what_changes_no_number_is_read(way: str, tmp_path: Path) -> None:
    folder = write_original(tmp_path, "llava-v1.5-7b")
    before = load(folder)
    norm = before.weights["lm"]["norm.weight"].copy()
    FINE[way](folder)
    after = load(folder)
    assert after.model == before.model
    assert (after.weights["lm"]["norm.weight"] == norm).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"s2": True},
        {"quantization_config": {"bits": 4}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"hidden_act": "gelu"},
        {"image_aspect_ratio": "highres"},
        {"mm_patch_merge_type": "spiral"},
        {"mm_vision_select_feature": "cls"},
        {"attention_sinks": 4},
    ],
)
def test_what_would_change_numbers_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = write_original(tmp_path, "llava-v1.5-7b")
    changed(**changes)(folder)
    with pytest.raises(ConfigError) as refused:
        load(folder)
    assert next(iter(changes)) in str(refused.value)


def test_an_end_of_answer_that_no_file_names_is_the_class_default(tmp_path: Path) -> None:
    folder = write_original(tmp_path, "llava-v1.5-7b")
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).model.prompts.eos == (2,)


def test_older_tokenizers_name_added_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder = write_original(tmp_path, "llava-v1.5-7b", vocab_size=1002, mm_use_im_start_end=True)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["added_tokens_decoder"]
    path.write_text(json.dumps(settings))
    ids = {"<im_end>": 1000, "<im_start>": 1001}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    source = load(folder)
    tokens = json.loads(source.tokenizer)["added_tokens"]
    assert {t["content"]: t["id"] for t in tokens if t["id"] >= 1000} == ids
    assert source.model.lm.config.vocab_size == 1002
    assert source.model.prompts.image_text == "<im_start><image><im_end>"
