"""LLaVA's own checkpoint layout: one folder with the LM, the projector and a config.json of `mm_*`.

The vision tower is a Hugging Face folder (or, for UniRepLKNet, a weight file) that
`mm_vision_tower` names. Source: the loaders of haotian-liu/LLaVA and its forks. What a fork does
differently is stated by the `OriginalRules` of its system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints.layouts import conversation, image_rules, towers
from edgevlm.toolkit.checkpoints.layouts.source import (
    ComponentTensors,
    Options,
    Source,
    add_tokens,
    below,
    check,
    check_tokenizer,
    find_prefix,
    read_eos,
    read_tokenizer,
    with_context,
)
from edgevlm.toolkit.checkpoints.weights import Checkpoint, open_checkpoint
from edgevlm.toolkit.models.recipes import Recipe, keep
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.strict import Reader
from edgevlm.toolkit.text.prompts import PromptRules
from edgevlm.toolkit.vlm import components, language_models
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig

IN_CHECKPOINT = "model.vision_tower.vision_tower."

# Keys that training scripts write and that do not change an image's answer: bookkeeping, training
# switches, video settings, resamplers (the originals build them but never apply them to images),
# and keys of Hugging Face's layout that some releases have in addition.
TRAINING_KEYS = (
    "add_faster_video add_time_instruction faster_token_stride force_sample freeze_backbone "
    "freeze_mm_mlp_adapter freeze_mm_vision_resampler ignore_index image_crop_resolution "
    "image_split_resolution image_token_index max_sequence_length mm_mask_drop_mode "
    "mm_mask_drop_ratio mm_mask_drop_ratio_lower mm_mask_drop_ratio_upper "
    "mm_mask_drop_skip_percentage mm_newline_position mm_perceiver_depth mm_perceiver_ff_mult "
    "mm_perceiver_latents mm_perceiver_pretrained mm_projector_lr mm_qformer_depth "
    "mm_qformer_latents mm_qformer_pretrained mm_spatial_pool_out_channels "
    "mm_resampler_type mm_spatial_pool_mode mm_spatial_pool_stride mm_tunable_parts "
    "mm_vision_tower_lr ms_cross_attn_lr pos_skipping_range projector_hidden_act text_config "
    "tokenizer_model_max_length tokenizer_padding_side tune_entire_model tune_mm_mlp_adapter "
    "tune_mm_vision_resampler tune_vision_tower tune_vit_from_layer use_mm_proj use_pos_skipping "
    "vision_config vision_feature_layer vision_feature_select_strategy vision_tower_lr "
    "vision_tower_pretrained"
).split()


@dataclass(frozen=True)
class OriginalRules:
    """What one system does in this layout.

    merger: makes the projector's configuration from config.json, the encoder and the hidden size
    of the language model. tower_wins: tower weights inside the checkpoint override those of the
    tower's folder. lone_newline: an image without tiles also gets the newline token of "unpad".
    taps: chooses the encoder's outputs among the hidden states that config.json selects.
    """

    system: str
    merger: Callable[[Reader, ComponentConfig, int], ComponentConfig]
    tower_wins: bool = False
    lone_newline: bool = False
    taps: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this layout."""
    return "mm_vision_tower" in config and config.get("model_type") in language_models.LLAVA_TYPES


def names_mlcd(config: Mapping[str, Any]) -> bool:
    """Whether the tower's name contains "mlcd", by which that fork chooses its tower class."""
    return "mlcd" in str(config.get("mm_vision_tower", "")).lower()


def load(folder: Path, config: Mapping[str, Any], options: Options, rules: OriginalRules) -> Source:
    """Read a checkpoint. Raises ConfigError and CheckpointError naming what does not fit."""
    kind = language_models.kind_in_llava(config)
    if kind == "qwen2":  # its original class ignores this key
        config = {**config, "rope_scaling": None}
    r = Reader(config, str(folder / "config.json"), options.ignore_keys)
    lm = ComponentConfig("lm", kind, models.lm(kind).Config.read(r))
    tower = towers.open_tower(folder, r, options, rules.taps)
    merger = rules.merger(r, tower.encoder, lm.config.hidden_size)
    images = image_rules.read_rules(
        r, tower.encoder, merger, tower.preprocess, lone_newline=rules.lone_newline
    )
    ends_rows = images.arrangement is not None and images.arrangement.newline
    spare = ["model.image_newline"] * ("unpad" in str(config.get("mm_patch_merge_type")))
    wins = _tower_wins(r, rules)
    r.choice("s2", [False], False)
    r.skip("s2_scales")
    wrapped = r.take("mm_use_im_start_end", bool, False)
    extra = ["<im_patch>"] * r.take("mm_use_im_patch_token", bool, True)
    extra += ["<im_start>", "<im_end>"] * wrapped
    r.skip(*TRAINING_KEYS)
    r.done()

    text, doubled = read_tokenizer(folder, slow=True)
    text = add_tokens(text, extra, lm.config.vocab_size)
    rows = check_tokenizer(text, lm.config.vocab_size, str(folder))
    checkpoint = open_checkpoint(folder, options.torch_reader)
    tensors = _tensors(lm, merger, ends_rows, checkpoint)
    inside = _tower_inside(tower, checkpoint) if wins else None
    in_folder = [*tensors.values(), *([inside] if inside else [])]
    check(in_folder, [*spare, *_unused(lm, merger, inside, tower)])
    if inside is None:
        check([tower.tensors], tower.unused)
    lm, lm_table = shrink_vocab(lm, tensors["lm"].table, rows)
    tensors |= {
        f"encoder.{tower.encoder.name}": inside or tower.tensors,
        "lm": replace(tensors["lm"], table=lm_table),
    }
    prompts = conversation.original(folder, config, kind, text)
    image_text = "<im_start><image><im_end>" if wrapped else "<image>"
    model = ModelConfig(
        folder.resolve().name,
        rules.system,
        (tower.encoder,),
        merger,
        with_context(lm, options.max_context),
        images,
        PromptRules(
            prompts.template,
            "pieces",
            read_eos(folder, config, kind),
            image_text=image_text,
            doubled_blank=doubled,
        ),
    )
    origin = {"layout": "llava", "tower": str(config["mm_vision_tower"])}
    origin["template"] = prompts.origin
    origin["tower_weights"] = "checkpoint" if inside else "tower folder"
    weights = {c.name: tensors[c.name].weights() for c in components.components(model) if c.shapes}
    return Source(model, weights, text, origin)


def _tower_wins(r: Reader, rules: OriginalRules) -> bool:
    """Whether tower weights inside the checkpoint override those of the tower's folder.

    Forks with `tower_wins` keep the folder's only if delay_load is set and the tower was not tuned.
    """
    trained = r.take("unfreeze_mm_vision_tower", bool, False)
    late = r.take("delay_load", bool, False)
    tuned = "mm_vision_tower" in str(r.raw("mm_tunable_parts"))
    return trained or (rules.tower_wins and (tuned or not late))


def _tensors(
    lm: ComponentConfig, merger: ComponentConfig, newline: bool, checkpoint: Checkpoint
) -> dict[str, ComponentTensors]:
    """The language model's and the projector's weights in the LLaVA folder."""
    file, projector = models.lm(lm.kind), models.merger(merger.kind)
    table = dict(projector.names(merger.config))
    if table:  # a single linear is called mm_projector.0 if its type is mlp1x_gelu
        prefixes = ("model.mm_projector.", "model.mm_projector.0.")
        table = below(table, find_prefix(table, checkpoint, *prefixes))
    shapes = dict(projector.shapes(merger.config))
    if newline:
        table["newline"] = keep("model.image_newline")
        shapes["newline"] = (lm.config.hidden_size,)
    return {
        "lm": ComponentTensors(file.names(lm.config), file.shapes(lm.config), checkpoint),
        "merger": ComponentTensors(table, shapes, checkpoint),
    }


def _tower_inside(tower: towers.Tower, checkpoint: Checkpoint) -> ComponentTensors | None:
    """The tower's weights inside the checkpoint; None if there are none."""
    keys = checkpoint.keys()
    if not any(key.startswith(IN_CHECKPOINT) for key in keys):
        return None
    file = models.encoder(tower.encoder.kind)
    table = file.names(tower.encoder.config)
    prefix = find_prefix(table, checkpoint, f"{IN_CHECKPOINT}vision_model.", IN_CHECKPOINT)
    return ComponentTensors(below(table, prefix), file.shapes(tower.encoder.config), checkpoint)


def _unused(
    lm: ComponentConfig,
    merger: ComponentConfig,
    inside: ComponentTensors | None,
    tower: towers.Tower,
) -> list[str]:
    """Globs of tensors in the LLaVA folder that are not read."""
    globs = [*models.lm(lm.kind).unused(lm.config), "model.vision_resampler.*"]
    spare = models.merger(merger.kind).unused(merger.config)
    globs += [f"model.mm_projector.{glob}" for glob in spare]
    if inside is None:
        return [*globs, f"{IN_CHECKPOINT}*"]
    of_tower = models.encoder(tower.encoder.kind).unused(tower.encoder.config)
    return globs + [f"{IN_CHECKPOINT}{p}{g}" for g in of_tower for p in ("", "vision_model.")]


def shrink_vocab(
    lm: ComponentConfig, table: Mapping[str, Recipe], rows: int
) -> tuple[ComponentConfig, dict[str, Recipe]]:
    """The LM with the vocabulary rows that its tokenizer knows, as the originals do."""
    if rows >= lm.config.vocab_size:
        return lm, dict(table)

    def cut(recipe: Recipe, axis: int) -> Recipe:
        def make(*arrays: Array) -> Array:
            whole = recipe.make(*arrays)
            return whole[:rows] if axis == 0 else whole[:, :rows]

        return replace(recipe, make=make)

    cuts = {"embed.weight": 0, "head.weight": 1}
    small = {n: cut(r, cuts[n]) if n in cuts else r for n, r in table.items()}
    return replace(lm, config=replace(lm.config, vocab_size=rows)), small
