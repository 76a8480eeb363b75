"""COMM (Jiang et al., arXiv 2310.08825): many levels of CLIP and DINOv2, merged, into Vicuna.

No code or weights were published. This file reads a checkpoint of edgevlm's own format, described
in docs/systems.md: config.json names two towers and a language model, model.safetensors holds the
merger. Whatever the paper leaves open is a named option with a default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints import hub
from edgevlm.toolkit.checkpoints.layouts import conversation, towers
from edgevlm.toolkit.checkpoints.layouts.generation import read_eos, read_rules
from edgevlm.toolkit.checkpoints.layouts.source import (
    ComponentTensors,
    Options,
    Source,
    check,
    new_tensors,
    with_context,
)
from edgevlm.toolkit.checkpoints.layouts.tokenizer_files import (
    add_tokens,
    check_tokenizer,
    read_tokenizer,
)
from edgevlm.toolkit.checkpoints.weights import open_checkpoint
from edgevlm.toolkit.errors import CheckpointError, ConfigError, ToolkitError
from edgevlm.toolkit.images.preprocess import ImageRules, Preprocess
from edgevlm.toolkit.models.encoders import clip, dinov2
from edgevlm.toolkit.models.lms import llama
from edgevlm.toolkit.models.mergers import comm
from edgevlm.toolkit.strict import MOST_LAYERS, Reader, read_json
from edgevlm.toolkit.text.prompts import PromptRules
from edgevlm.toolkit.text.sentencepiece_text import SentencePieceRules
from edgevlm.toolkit.vlm import components, language_models, presets
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig

MODEL_TYPE = "edgevlm_comm"
_MERGES = ("norm_linear", "linear_norm", "layerscale", "mean", "mean_half", "conv1", "conv3")


def claims(folder: Path, config: Mapping[str, Any], options: Options) -> bool:
    """Whether a checkpoint folder is of this system."""
    return config.get("model_type") == MODEL_TYPE


def load(folder: Path, config: Mapping[str, Any], options: Options) -> Source:
    """Read a checkpoint. Raises ConfigError and CheckpointError naming what does not fit."""
    r = Reader(config, str(folder / "config.json"), options.ignore_keys)
    r.skip("model_type")
    side = r.count("image_size", 336)
    folders = {
        name: _find_folder(folder, r.take(name, str), options) for name in ("clip", "dinov2")
    }
    lm_folder = _find_folder(folder, r.take("language_model", str), options)
    encoders = {
        "clip": _clip(folders["clip"], r, options),
        "dinov2": _dinov2(folders["dinov2"], r, side, options),
    }
    lm = _read_lm(lm_folder, options)
    merger = _read_merger(r, encoders, lm.config.hidden_size, side)
    images = ImageRules(_preprocessing(r, folders, side, options))
    wrapped = r.take("use_im_start_end", bool, True)
    stated = r.optional("template", str)
    r.done()
    text, pieces = _tokenizer(lm_folder, lm, wrapped)
    prompts = conversation.original(lm_folder, config, lm.kind, text, stated)

    tensors = {
        f"encoder.{name}": _tower(encoder, folders[name], options)
        for name, encoder in encoders.items()
    }
    tensors["lm"] = _lm_tensors(lm, lm_folder, options)
    tensors["merger"] = _merger_tensors(merger, folder, options)
    check([tensors["merger"]], comm.unused(merger.config))
    lm_config = read_json(lm_folder / "config.json")
    model = ModelConfig(
        folder.resolve().name,
        "comm",
        tuple(encoders.values()),
        merger,
        with_context(lm, options.max_context),
        images,
        PromptRules(
            prompts.template,
            "pieces",
            read_eos(lm_folder, lm_config, lm.kind, text),
            image_text="<im_start><image><im_end>" if wrapped else "<image>",
            sentencepiece=pieces,
        ),
        read_rules(lm_folder, lm_config, lm.config.vocab_size, options.ignore_keys),
    )
    weights = {c.name: tensors[c.name].weights() for c in components.components(model)}
    return Source(model, weights, text, {"layout": "comm", "template": prompts.origin})


def _find_folder(folder: Path, name: str, options: Options) -> Path:
    """The folder that config.json calls `name`: in the checkpoint, beside it, or that path.

    Else, if it is a model id, that of the hub's cache; unless `options.offline`, it is downloaded.
    """
    for path in (folder / name, folder.parent / name, Path(name)):
        if (path / "config.json").exists():
            return path
    reason, download = "", ""
    if hub.is_model_id(name):
        try:
            return hub.locate_part(name, offline=options.offline)
        except ToolkitError as missing:
            reason, download = f" ({missing.message})", f"; or: {missing.hint}"
    raise CheckpointError(
        f"{name!r}, which {folder / 'config.json'} names, is not on this machine{reason}",
        hint=f"put its folder into {folder} or beside it{download}",
    )


def _levels(r: Reader, key: str, depth: int, default: range) -> tuple[int, ...]:
    """The value of `key`: blocks counted from 0 as a list, or "all"."""
    raw = r.raw(key)
    blocks = list(default) if raw is None else list(range(depth)) if raw == "all" else raw
    valid = isinstance(blocks, list) and all(isinstance(n, int) and 0 <= n < depth for n in blocks)
    if not valid or not blocks:
        raise ConfigError(
            f"{r.where}: {key} = {raw!r} are no blocks of a tower with {depth}",
            hint='a list such as [18, 19, 20, 21, 22, 23], or "all"',
        )
    return tuple(blocks)


def _clip(folder: Path, r: Reader, options: Options) -> ComponentConfig:
    data = read_json(folder / "config.json")
    reader = Reader(data, str(folder / "config.json"), options.ignore_keys)
    depth = reader.count("num_hidden_layers", 12, most=MOST_LAYERS)
    levels = _levels(r, "clip_levels", depth, range(depth))
    config = clip.Config.read(reader, tuple(n + 1 for n in levels), False)
    reader.done()
    return ComponentConfig("clip", "clip", config)


def _dinov2(folder: Path, r: Reader, side: int, options: Options) -> ComponentConfig:
    data = read_json(folder / "config.json")
    reader = Reader(data, str(folder / "config.json"), options.ignore_keys)
    depth = reader.count("num_hidden_layers", 12, most=MOST_LAYERS)
    levels = _levels(r, "dinov2_levels", depth, range(depth * 3 // 4, depth))
    config = dinov2.Config.read(reader, tuple(n + 1 for n in levels), False, image_size=side)
    reader.done()
    return ComponentConfig("dinov2", "dinov2", config)


def _tower(encoder: ComponentConfig, folder: Path, options: Options) -> ComponentTensors:
    tensors, unused = towers.tensors_in(encoder, folder, options)
    check([tensors], unused)
    return tensors


def _lm_tensors(lm: ComponentConfig, folder: Path, options: Options) -> ComponentTensors:
    file, checkpoint = models.lm(lm.kind), open_checkpoint(folder, options.torch_reader)
    tensors = ComponentTensors(file.names(lm.config), file.shapes(lm.config), checkpoint)
    check([tensors], file.unused(lm.config))
    return tensors


def _merger_tensors(merger: ComponentConfig, folder: Path, options: Options) -> ComponentTensors:
    table, shapes = comm.names(merger.config), comm.shapes(merger.config)
    if options.new_merger is not None:
        return new_tensors(table, shapes, options.new_merger(merger, shapes))
    return ComponentTensors(table, shapes, open_checkpoint(folder, options.torch_reader))


def _read_lm(folder: Path, options: Options) -> ComponentConfig:
    data = read_json(folder / "config.json")
    reader = Reader(data, str(folder / "config.json"), options.ignore_keys)
    known = language_models.MODEL_TYPES
    kind = known[reader.choice("model_type", list(known))]
    config = models.lm(kind).Config.read(reader)
    reader.done()
    return ComponentConfig("lm", kind, config)


def _read_merger(
    r: Reader, encoders: Mapping[str, ComponentConfig], outputs: int, side: int
) -> ComponentConfig:
    merge = r.choice("merge", _MERGES, "norm_linear")
    scale = r.choice("scale", ("softmax", "raw"), "softmax")
    depth, ratio = r.count("mlp_depth", 1, least=0), r.count("mlp_ratio", 4)
    tokens = {encoder.config.tokens for encoder in encoders.values()}
    if len(tokens) != 1:
        raise ConfigError(
            f"{r.where}: CLIP gives {encoders['clip'].config.tokens} tokens and DINOv2 "
            f"{encoders['dinov2'].config.tokens} for images of {side}",
            hint="choose image_size so that both grids are equal, as 336 with patches of 14",
        )
    branches = tuple(
        comm.Branch(
            name,
            tuple(tap - 1 for tap in encoder.config.taps),
            encoder.config.hidden_size,
            merge,  # type: ignore[arg-type]
            scale,  # type: ignore[arg-type]
            mlp_depth=depth if name == "dinov2" else 0,
            mlp_ratio=ratio,
        )
        for name, encoder in encoders.items()
    )
    eps = r.positive("layer_norm_eps", 1e-5)
    return ComponentConfig(
        "merger", "comm", comm.Config(branches, outputs, math.isqrt(tokens.pop()), eps)
    )


def _preprocessing(
    r: Reader, folders: Mapping[str, Path], side: int, options: Options
) -> dict[str, Preprocess]:
    """CLIP's geometry for both towers, and each tower's own mean and deviation."""
    aspect = r.choice("image_aspect_ratio", ("pad", "square"), "pad")
    first = towers.read_rule(folders["clip"], options)
    if first.size != (side, side):
        raise ConfigError(
            f"{folders['clip']} makes images of {first.size}, config.json states {side}",
            hint="set image_size to what the CLIP tower was trained for",
        )
    first = first.padded() if aspect == "pad" else first
    other = towers.read_rule(folders["dinov2"], options)
    values = {name: getattr(other, name) for name in ("scale", "mean", "std", "normalise")}
    return {"clip": first, "dinov2": replace(first, **values)}


def _tokenizer(
    folder: Path, lm: ComponentConfig, wrapped: bool
) -> tuple[str, SentencePieceRules | None]:
    around = ["<im_start>", "<im_end>"] * wrapped
    text, pieces = read_tokenizer(folder, slow=True)
    text = add_tokens(text, around)
    check_tokenizer(text, lm.config.vocab_size, str(folder), around)
    return text, pieces


def _preset(name: str, lm: llama.Config) -> ModelConfig:
    levels = {"clip": tuple(range(24)), "dinov2": tuple(range(18, 24))}
    base = {"clip": presets.CLIP_L_336, "dinov2": presets.DINOV2_L_336}
    encoders = [
        ComponentConfig(n, n, presets.tapped(base[n], *(level + 1 for level in levels[n])))
        for n in base
    ]
    branches = tuple(
        comm.Branch(n, levels[n], 1024, mlp_depth=1 if n == "dinov2" else 0) for n in base
    )
    rule = presets.clip_pixels(336).padded()
    other = presets.imagenet_pixels(336)
    return presets.model(
        name,
        "comm",
        encoders,
        ComponentConfig("merger", "comm", comm.Config(branches, lm.hidden_size, 24)),
        lm,
        ImageRules({"clip": rule, "dinov2": replace(rule, mean=other.mean, std=other.std)}),
    )


PRESETS = presets.with_sibling("comm-7b", presets.VICUNA_7B, _preset)
