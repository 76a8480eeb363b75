"""Keys of published configurations that cannot change a number, for each class that reads them.

The rule (docs/systems.md): a key may be ignored only by name, and only for a class whose code does
not read it when it answers a question. Every reader asks this file (`Reader.ignore`); a key that
stands neither here nor in the reader is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Keys that are ignored for one reason."""

    reason: str
    keys: frozenset[str]


def _group(reason: str, *keys: str) -> Group:
    return Group(reason, frozenset(" ".join(keys).split()))


_LANGUAGE_MODEL = (
    "attention_bias head_dim hidden_act hidden_size intermediate_size layer_types "
    "max_position_embeddings max_window_layers mlp_bias num_attention_heads num_hidden_layers "
    "num_key_value_heads pretraining_tp rms_norm_eps rope_parameters rope_scaling rope_theta "
    "sliding_window use_sliding_window vocab_size"
)

GROUPS: Mapping[str, Group] = {
    "bookkeeping": _group(
        "transformers writes them into every file; the forward pass reads none of them",
        "_attn_implementation _attn_implementation_autoset _attn_implementation_internal "
        "_commit_hash _flash_attn_2_enabled _from_model_config _name_or_path add_cross_attention "
        "architectures attn_implementation auto_map chunk_size_feed_forward "
        "cross_attention_hidden_size dtype finetuning_task gradient_checkpointing id2label "
        "initializer_factor initializer_range is_composition is_decoder is_encoder_decoder "
        "label2id low_cpu_mem_usage model_type name_or_path neftune_noise_alpha "
        "output_attentions output_hidden_states problem_type pruned_heads return_dict "
        "task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype "
        "torchscript transformers.js_config transformers_version trust_remote_code "
        "unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attention_2 use_flash_attn",
    ),
    "generation": _group(
        "they concern generating, which generation_config.json settles",
        "bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id "
        "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id "
        "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty "
        "max_length min_length no_repeat_ngram_size num_beam_groups num_beams "
        "num_return_sequences output_scores pad_token_id prefix remove_invalid_values "
        "repetition_penalty return_dict_in_generate sep_token_id suppress_tokens temperature "
        "top_k top_p typical_p",
    ),
    "dropout": _group(
        "dropout acts in training only",
        "activation_dropout attention_dropout attention_probs_dropout_prob attn_pdrop "
        "classifier_dropout drop_path_rate dropout embd_pdrop ffn_dropout hidden_dropout "
        "hidden_dropout_prob layerdrop proj_dropout resid_dropout resid_pdrop",
    ),
    "training": _group(
        "training scripts of LLaVA and its forks write them; the model does not read them",
        "bits data_path double_quant faster_token_stride freeze_backbone freeze_mm_mlp_adapter "
        "freeze_mm_vision_resampler group_by_modality_length image_crop_resolution image_folder "
        "image_split_resolution image_token_len is_multimodal lazy_preprocess lora_alpha "
        "lora_bias lora_dropout lora_enable lora_r lora_weight_path max_sequence_length "
        "mm_mask_drop_mode mm_mask_drop_ratio mm_mask_drop_ratio_lower mm_mask_drop_ratio_upper "
        "mm_mask_drop_skip_percentage mm_projector_lr mm_tunable_parts mm_vision_tower_lr "
        "model_max_length ms_cross_attn_lr output_dir overwrite_config "
        "pos_skipping_range pretrain_mm_mlp_adapter quant_type "
        "s2_scales sep_image_conv_front tokenizer_model_max_length tokenizer_padding_side "
        "tune_entire_model tune_mm_mlp_adapter tune_mm_vision_resampler tune_vision_tower "
        "tune_vit_from_layer use_mm_proj use_pos_skipping version "
        "vision_tower vision_tower_lr vision_tower_pretrained",
    ),
    "video": _group(
        "they concern videos; an image never meets them",
        "add_faster_video add_time_instruction force_sample frames_upbound max_frames "
        "mm_newline_position mm_pooling_position mm_spatial_pool_mode "
        "mm_spatial_pool_out_channels mm_spatial_pool_stride num_frames spatial_pool_mode "
        "spatial_pool_out_channels spatial_pool_stride video_folder video_fps video_seq_length "
        "video_token_id video_token_index",
    ),
    "resampler": _group(
        "the originals build the resampler and never apply it to images",
        "mm_perceiver_depth mm_perceiver_ff_mult mm_perceiver_latents mm_perceiver_pretrained "
        "mm_qformer_depth mm_qformer_latents mm_qformer_pretrained mm_resampler_type",
    ),
    "huggingface": _group(
        "keys of Hugging Face's classes, which LLaVA's own classes do not read",
        "ignore_index image_seq_length image_token_id image_token_index "
        "multimodal_projector_bias projector_hidden_act text_config use_image_newline_parameter "
        "vision_aspect_ratio vision_config vision_feature_layer vision_feature_select_strategy",
    ),
    "original": _group(
        "keys of LLaVA's own classes, which Hugging Face's classes do not read",
        "delay_load image_aspect_ratio mm_hidden_size mm_patch_merge_type mm_projector_type "
        "mm_use_im_patch_token mm_use_im_start_end mm_vision_select_feature "
        "mm_vision_select_layer mm_vision_tower s2 s2_scales unfreeze_mm_vision_tower "
        "use_mm2_proj",
    ),
    "old_window": _group(
        "the transformers that LLaVA's own classes run on has no window for Llama; that of today "
        "has one, so that Hugging Face's layout refuses it",
        "sliding_window",
    ),
    "outer": _group(
        "the class reads the language model's settings from text_config", _LANGUAGE_MODEL
    ),
    "outer_image": _group(
        "the class makes its token arrangement without them",
        "ignore_index image_seq_length",
    ),
    "tiles": _group(
        "keys of the classes that cut images into tiles; this class makes one view",
        "image_grid_pinpoints use_image_newline_parameter vision_aspect_ratio",
    ),
    "aspect": _group("read by LlavaOnevision alone", "vision_aspect_ratio"),
    "llama": _group(
        "keys of other language models, which LlamaForCausalLM does not read; pretraining_tp "
        "states in how many pieces training summed the same sum",
        "max_window_layers pretraining_tp qkv_bias use_mrope use_sliding_window",
    ),
    "mistral": _group(
        "keys of other language models, which MistralForCausalLM does not read; biases that are "
        "stored all the same are refused as unexpected tensors",
        "attention_bias max_window_layers mlp_bias pretraining_tp qkv_bias use_mrope "
        "use_sliding_window",
    ),
    "qwen2": _group(
        "keys of other language models, which Qwen2ForCausalLM does not read; the window counts "
        "only with use_sliding_window, which is refused",
        "attention_bias max_window_layers mlp_bias pretraining_tp qkv_bias sliding_window "
        "use_mrope",
    ),
    "tower": _group(
        "a vision tower has no vocabulary and no projection of its own; its preprocessing is read "
        "from preprocessor_config.json",
        "crop_size do_center_crop do_convert_rgb do_normalize do_rescale do_resize "
        "feature_extractor_type image_mean image_processor_type image_std "
        "logit_scale_init_value max_position_embeddings processor_class projection_dim "
        "projector_hidden_act qkv_bias resample rescale_factor size tie_word_embeddings "
        "vision_use_head vocab_size",
    ),
    "dinov2": _group(
        "settings of its use as a backbone; patch tokens are taken before the final norm",
        "apply_layernorm layerscale_value out_features out_indices reshape_hidden_states "
        "stage_names use_mask_token",
    ),
    "convnext": _group(
        "settings of its use as a backbone",
        "out_features out_indices stage_names",
    ),
    "lora": _group(
        "bookkeeping of PEFT, and how the adapter was made; its tensors' names say what it changes",
        "base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules "
        "inference_mode layers_pattern layers_to_transform loftq_config lora_dropout "
        "megatron_config megatron_core peft_version auto_mapping qalora_group_size revision "
        "runtime_config target_modules task_type",
    ),
    "packed": _group(
        "how GPTQ and AWQ chose the codes, what programs run them with, and which modules are in "
        "float, which the tensors show; the order of desc_act is in the tensors too",
        "act_group_aware backend batch_size block_name_to_quantize cache_block_outputs "
        "damp_auto_increment damp_percent dataset desc_act disable_exllama do_fuse "
        "exllama_config fuse_max_seq_len inside_layer_modules lm_head max_input_length meta "
        "method model_file_base_name model_name_or_path model_seqlen "
        "module_name_preceding_first_block modules_in_block_to_quantize modules_to_fuse "
        "modules_to_not_convert mse static_groups sym tokenizer true_sequential use_cuda_fp16 "
        "use_exllama",
    ),
    "preprocessing": _group(
        "read elsewhere, or not read by the image processors of CLIP, SigLIP and LLaVA",
        "_valid_processor_keys auto_map crop_pct data_format default_to_square device "
        "disable_grouping feature_extractor_type image_grid_pinpoints image_seq_length "
        "image_token input_data_format num_additional_image_tokens pad pad_size patch_size "
        "processor_class return_tensors size_divisor tokenizer_class "
        "vision_feature_select_strategy",
    ),
}

_AROUND_TEXT = (
    *("training", "video", "resampler", "original", "outer", "outer_image"),
    *("llama", "mistral", "qwen2"),
)
# Which groups hold for which class of configuration, beside "bookkeeping", "generation" and
# "dropout", which hold for all.
CLASSES: Mapping[str, tuple[str, ...]] = {
    "original": ("training", "video", "resampler", "huggingface", "old_window"),
    "llava": (*_AROUND_TEXT, "tiles"),
    "llava_next": (*_AROUND_TEXT, "aspect"),
    "llava_onevision": _AROUND_TEXT,
    "text": ("training", "video", "resampler", "original", "huggingface"),
    "llama": ("llama",),
    "mistral": ("mistral",),
    "qwen2": ("qwen2",),
    "tower": ("tower",),
    "dinov2": ("tower", "dinov2"),
    "convnext": ("tower", "convnext"),
    "preprocessing": ("preprocessing",),
    "lora": ("lora",),
    "packed": ("packed",),
}
BOOKKEEPING = frozenset().union(
    *(GROUPS[name].keys for name in ("bookkeeping", "generation", "dropout"))
)

# Keys that change numbers and are not implemented, with the values (beside null and false) at which
# they have no effect. No hint may advise to ignore them.
DECISIVE: Mapping[str, tuple[float, ...]] = {
    "alibi": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "cross_attention_layers": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mm_dense_connector_type": (),
    "no_rope_layers": (),
    "num_experts": (0,),
    "num_local_experts": (0, 1),
    "partial_rotary_factor": (1,),
    "qk_layernorm": (),
    "qk_norm": (),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "s2": (),
    "sliding_window": (),
    "use_mm2_proj": (),
    "use_qk_norm": (),
}


def inert(name: str) -> frozenset[str]:
    """The keys that cannot change a number for a class of configuration."""
    return frozenset().union(*(GROUPS[group].keys for group in CLASSES[name]))


def decides(key: str, value: object) -> bool:
    """Whether a key at this value changes what the model computes, in a way not implemented."""
    return (
        key in DECISIVE
        and value is not None
        and value is not False
        and (value not in DECISIVE[key])
    )
