"""Hugging Face's layout: text_config, vision_config, and one file with all three parts.

Tensor names exist in two generations: language_model.model.* (transformers 4 and what 5 saves)
and model.language_model.* (inside 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit import models
from toolkit.config import Part
from toolkit.errors import CheckpointError, ConfigError
from toolkit.images import Preprocess, read_preprocess
from toolkit.layouts.source import Options, Stored, below, find_prefix, read_encoder
from toolkit.models.mergers import mlp
from toolkit.strict import Reader, read_json
from toolkit.weights import Checkpoint, Recipe, flip, keep

LMS = {"llama": "llama", "qwen2": "qwen2"}


def read_lm(r: Reader) -> Part:
    """The language model under text_config."""
    text = r.sub("text_config")
    kind = LMS[text.choice("model_type", list(LMS), "llama")]
    config = models.lm(kind).Config.read(text)
    text.done()
    return Part("lm", kind, config)


def read_tower(config: Mapping[str, Any], r: Reader, name: str, options: Options) -> Part:
    """The encoder under vision_config, with the layers that vision_feature_layer names."""
    vision = r.take("vision_config", dict)
    kind, reader = read_encoder(vision, f"{r.where}: vision_config", options)
    raw = r.raw("vision_feature_layer")
    layer = -2 if raw is None else raw
    taps = tuple(layer) if isinstance(layer, list) else (int(layer),)
    strategy = r.choice("vision_feature_select_strategy", ["default", "full"], "default")
    parsed = models.encoder(kind).Config.read(reader, taps, strategy == "full")
    reader.done()
    return Part(name, kind, parsed)


def read_processor(folder: Path, options: Options) -> Preprocess:
    """Preprocessing from preprocessor_config.json or processor_config.json."""
    path = folder / "preprocessor_config.json"
    combined = folder / "processor_config.json"
    if path.exists():
        settings = Reader(read_json(path), str(path), options.ignore_keys)
    elif combined.exists() and "image_processor" in read_json(combined):
        settings = Reader(read_json(combined), str(combined)).sub("image_processor")
    else:
        raise CheckpointError(
            f"{folder} does not say how pictures become pixels (preprocessor_config.json)",
            hint="save the processor of the model into the folder too",
        )
    rule = read_preprocess(settings)
    settings.done()
    return rule


def read_projector(r: Reader, inputs: tuple[int, ...], outputs: int) -> Part:
    """Two linears with GELU between."""
    r.choice("projector_hidden_act", ["gelu"], "gelu")
    bias = r.take("multimodal_projector_bias", bool, True)
    return Part("merger", "mlp", mlp.Config(inputs, outputs, 2, bias))


def projector_names(c: mlp.Config) -> dict[str, Recipe]:
    """Where the projector's tensors stand below `multi_modal_projector.`."""
    table = {}
    for i in range(c.layers):
        table[f"linears.{i}.weight"] = flip(f"linear_{i + 1}.weight")
        if c.bias:
            table[f"linears.{i}.bias"] = keep(f"linear_{i + 1}.bias")
    return table


def lm_tensors(lm: Part, checkpoint: Checkpoint) -> Stored:
    """The language model's weights, in either generation of names."""
    file = models.lm(lm.kind)
    table = file.names(lm.config)
    old = find_prefix(table, checkpoint, "language_model.", "") == "language_model."
    if not old and "model.language_model.embed_tokens.weight" in checkpoint:
        renamed = {
            name: Recipe(
                tuple(s.replace("model.", "model.language_model.", 1) for s in r.sources), r.make
            )
            for name, r in table.items()
        }
        return Stored(renamed, file.shapes(lm.config), checkpoint)
    return Stored(below(table, "language_model." * old), file.shapes(lm.config), checkpoint)


def part_tensors(
    table: Mapping[str, Recipe],
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
    *prefixes: str,
) -> tuple[Stored, str]:
    """Tower or projector below whichever of `prefixes` the file uses, and that prefix."""
    prefix = find_prefix(table, checkpoint, *prefixes)
    return Stored(below(table, prefix), shapes, checkpoint), prefix


def image_token(config: Mapping[str, Any], where: str) -> int:
    """The id that stands for a picture in a tokenized prompt."""
    found = config.get("image_token_index", config.get("image_token_id"))
    if not isinstance(found, int):
        raise ConfigError(f"{where} names no image_token_index")
    return found
