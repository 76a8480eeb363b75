"""LLaVA's own layout: one folder with the LM, the projector and `mm_*` keys in config.json.

The vision tower is a Hugging Face folder that `mm_vision_tower` names. Source: the loaders of
haotian-liu/LLaVA and its forks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit import models
from toolkit.config import Part
from toolkit.errors import CheckpointError, ConfigError
from toolkit.images import Preprocess, read_preprocess
from toolkit.layouts.source import Options, Stored, below, find_prefix, read_encoder
from toolkit.models.mergers import mlp
from toolkit.ops import Array
from toolkit.strict import Reader, read_json
from toolkit.weights import Checkpoint, Recipe, open_checkpoint

LMS = {"llava_llama": "llama", "llava": "llama", "llava_qwen": "qwen2"}
IN_CHECKPOINT = "model.vision_tower.vision_tower."

# Written by the training scripts, read by no forward pass.
TRAINING_KEYS = (
    "freeze_backbone",
    "freeze_mm_mlp_adapter",
    "freeze_mm_vision_resampler",
    "mm_projector_lr",
    "mm_tunable_parts",
    "mm_vision_tower_lr",
    "ms_cross_attn_lr",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "tune_entire_model",
    "tune_mm_mlp_adapter",
    "tune_mm_vision_resampler",
    "tune_vision_tower",
    "tune_vit_from_layer",
    "unfreeze_mm_vision_tower",
    "use_mm_proj",
    "vision_tower_lr",
    "vision_tower_pretrained",
    "mm_use_im_patch_token",
    "max_sequence_length",
    "mm_resampler_type",
)


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this layout."""
    return "mm_vision_tower" in config and config.get("model_type") in LMS


def read_lm(r: Reader) -> Part:
    """The language model: its keys stand in config.json itself."""
    kind = LMS[r.take("model_type", str)]
    return Part("lm", kind, models.lm(kind).Config.read(r))


def read_projector(r: Reader, inputs: tuple[int, ...], outputs: int) -> Part:
    """`linear` or `mlp{N}x_gelu`."""
    name = r.take("mm_projector_type", str, "linear")
    match = re.fullmatch(r"mlp(\d+)x_gelu", name)
    if name != "linear" and not match:
        raise ConfigError(
            f"{r.where}: mm_projector_type = {name!r} is not implemented",
            hint="implemented: linear, mlp{N}x_gelu",
        )
    width = r.take("mm_hidden_size", int)
    if width != sum(inputs):
        raise ConfigError(f"{r.where}: mm_hidden_size = {width}, the tower gives {sum(inputs)}")
    layers = int(match[1]) if match else 1
    return Part("merger", "mlp", mlp.Config(inputs, outputs, layers))


def find_tower(name: str, folder: Path, options: Options) -> Path:
    """The folder that `mm_vision_tower` means: given, inside, beside, or from here."""
    if options.vision_tower is not None:
        return options.vision_tower
    places = [
        folder / name,
        folder.parent / name,
        Path(name),
        folder / Path(name).name,
        folder.parent / Path(name).name,
    ]
    for place in places:
        if (place / "config.json").exists():
            return place
    raise CheckpointError(
        f"the vision tower {name!r} that {folder / 'config.json'} names is not on this machine",
        hint=f"put its folder beside {folder}, or name it: --vision-tower FOLDER",
    )


def read_tower(
    folder: Path, name: str, taps: tuple[int, ...], class_token: bool, options: Options
) -> tuple[Part, Preprocess]:
    """The encoder of a tower folder, and its preprocessing."""
    path = folder / "config.json"
    kind, reader = read_encoder(read_json(path), str(path), options)
    config = models.encoder(kind).Config.read(reader, taps, class_token)
    reader.done()
    processor = folder / "preprocessor_config.json"
    settings = Reader(read_json(processor), str(processor), options.ignore_keys)
    rule = read_preprocess(settings)
    settings.done()
    if rule.size != config.pixels:
        raise ConfigError(
            f"{processor} makes pictures of {rule.size}, the tower takes {config.pixels}"
        )
    return Part(name, kind, config), rule


def read_taps(r: Reader) -> tuple[tuple[int, ...], bool]:
    """mm_vision_select_layer as a tuple, and whether the class token stays."""
    raw = r.raw("mm_vision_select_layer")
    if isinstance(raw, str):
        raw = [int(n) for n in raw[4:].split("/")] if raw.startswith("list") else int(raw)
    if raw is None or isinstance(raw, bool):
        raise ConfigError(f"{r.where} lacks the key 'mm_vision_select_layer'")
    feature = r.choice("mm_vision_select_feature", ["patch", "cls_patch"], "patch")
    return tuple(raw) if isinstance(raw, list) else (int(raw),), feature == "cls_patch"


def tower_tensors(part: Part, folder: Path, options: Options) -> tuple[Stored, tuple[str, ...]]:
    """The tower's weights from its own folder, and globs of what may be left there."""
    file = models.encoder(part.kind)
    checkpoint = open_checkpoint(folder, options.torch_reader)
    table = file.names(part.config)
    prefix = find_prefix(table, checkpoint, "vision_model.", "")
    unused = tuple(prefix + glob for glob in file.unused(part.config))
    other = (
        "text_model.*",
        "logit_scale",
        "logit_bias",
        "text_projection.*",
        "visual_projection.*",
    )
    return Stored(below(table, prefix), file.shapes(part.config), checkpoint), (*unused, *other)


def lm_tensors(lm: Part, checkpoint: Checkpoint) -> Stored:
    """The language model's weights in the LLaVA folder."""
    file = models.lm(lm.kind)
    return Stored(file.names(lm.config), file.shapes(lm.config), checkpoint)


def projector_tensors(merger: Part, checkpoint: Checkpoint) -> Stored:
    """The projector's weights in the LLaVA folder."""
    file = models.merger(merger.kind)
    table = below(file.names(merger.config), "model.mm_projector.")
    return Stored(table, file.shapes(merger.config), checkpoint)


def shrink_vocab(
    lm: Part, table: Mapping[str, Recipe], rows: int
) -> tuple[Part, dict[str, Recipe]]:
    """The LM with only the rows its tokenizer knows, as the originals' loader resizes it."""
    if rows >= lm.config.vocab:
        return lm, dict(table)

    def cut(recipe: Recipe, axis: int) -> Recipe:
        def make(*arrays: Array) -> Array:
            whole = recipe.make(*arrays)
            return whole[:rows] if axis == 0 else whole[:, :rows]

        return replace(recipe, make=make)

    cuts = {"embed.weight": 0, "head.weight": 1}
    small = {n: cut(r, cuts[n]) if n in cuts else r for n, r in table.items()}
    return replace(lm, config=replace(lm.config, vocab=rows)), small
