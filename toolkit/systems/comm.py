"""COMM (Jiang et al., arXiv 2310.08825): CLIP and DINOv2 at many levels, merged, into Vicuna.

No code or weights were published. This reads a folder of our own format, described in
docs/systems.md: config.json names two towers and a language model, model.safetensors holds the
merger. What the paper leaves open is a named option with the default we propose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints.layouts import original, towers
from edgevlm.toolkit.checkpoints.layouts.source import (
    ComponentTensors,
    Options,
    Source,
    add_tokens,
    check,
    check_tokenizer,
    read_eos,
    read_tokenizer,
    with_context,
)
from edgevlm.toolkit.checkpoints.weights import open_checkpoint
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.images.preprocess import ImageRules, Preprocess
from edgevlm.toolkit.models.encoders import clip, dinov2
from edgevlm.toolkit.models.lms import llama
from edgevlm.toolkit.models.mergers import comm
from edgevlm.toolkit.strict import MOST_LAYERS, Reader, read_json
from edgevlm.toolkit.text.prompts import PromptRules
from edgevlm.toolkit.vlm import components, presets
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig

MODEL_TYPE = "edgevlm_comm"
_LMS = {"llama": "llama", "qwen2": "qwen2", "mistral": "mistral"}
_MERGES = ("norm_linear", "linear_norm", "layerscale", "mean", "mean_half", "conv1", "conv3")


def claims(folder: Path, config: Mapping[str, Any], options: Options) -> bool:
    """Whether a checkpoint folder is of this system."""
    return config.get("model_type") == MODEL_TYPE


def load(folder: Path, config: Mapping[str, Any], options: Options) -> Source:
    """Read a checkpoint folder of our format."""
    r = Reader(config, str(folder / "config.json"), options.ignore_keys)
    r.skip("model_type")
    side = r.count("image_size", 336)
    places = {name: _beside(folder, r.take(name, str)) for name in ("clip", "dinov2")}
    lm_folder = _beside(folder, r.take("language_model", str))
    eyes = {
        "clip": _clip(places["clip"], r, options),
        "dinov2": _dinov2(places["dinov2"], r, side, options),
    }
    lm = _read_lm(lm_folder, options)
    merger = _read_merger(r, eyes, lm.config.hidden_size, side)
    images = ImageRules(_pixels(r, places, side, options))
    wrapped = r.take("use_im_start_end", bool, True)
    template = r.take("template", str, original.TEMPLATES[lm.kind])
    r.done()
    text, doubled = _tokenizer(lm_folder, lm, wrapped)

    stored = {f"encoder.{name}": _tower(eye, places[name], options) for name, eye in eyes.items()}
    file = models.lm(lm.kind)
    brain = open_checkpoint(lm_folder, options.torch_reader)
    stored["lm"] = ComponentTensors(file.names(lm.config), file.shapes(lm.config), brain)
    own = open_checkpoint(folder, options.torch_reader)
    table, shapes = comm.names(merger.config), comm.shapes(merger.config)
    stored["merger"] = ComponentTensors(table, shapes, own)
    check([stored["merger"]], comm.unused(merger.config))
    check([stored["lm"]], file.unused(lm.config))
    model = ModelConfig(
        folder.resolve().name,
        "comm",
        tuple(eyes.values()),
        merger,
        with_context(lm, options.max_context),
        images,
        PromptRules(
            template,
            "pieces",
            read_eos(lm_folder, read_json(lm_folder / "config.json"), lm.kind),
            image_text="<im_start><image><im_end>" if wrapped else "<image>",
            doubled_blank=doubled,
        ),
    )
    weights = {p.name: stored[p.name].weights() for p in components.components(model)}
    return Source(model, weights, text, {"layout": "comm"})


def _beside(folder: Path, name: str) -> Path:
    """A folder that config.json names: inside the checkpoint, beside it, or as it stands."""
    for place in (folder / name, folder.parent / name, Path(name)):
        if (place / "config.json").exists():
            return place
    raise CheckpointError(
        f"{name!r}, which {folder / 'config.json'} names, is not on this machine",
        hint=f"put its folder into {folder} or beside it",
    )


def _levels(r: Reader, key: str, depth: int, default: range) -> tuple[int, ...]:
    """Blocks counted from 0: a list, or "all"."""
    raw = r.raw(key)
    found = list(default) if raw is None else list(range(depth)) if raw == "all" else raw
    fine = isinstance(found, list) and all(isinstance(n, int) and 0 <= n < depth for n in found)
    if not fine or not found:
        raise ConfigError(
            f"{r.where}: {key} = {raw!r} are no blocks of a tower with {depth}",
            hint='a list such as [18, 19, 20, 21, 22, 23], or "all"',
        )
    return tuple(found)


def _clip(place: Path, r: Reader, options: Options) -> ComponentConfig:
    data = read_json(place / "config.json")
    reader = Reader(data, str(place / "config.json"), options.ignore_keys)
    depth = reader.count("num_hidden_layers", 12, most=MOST_LAYERS)
    levels = _levels(r, "clip_levels", depth, range(depth))
    config = clip.Config.read(reader, tuple(n + 1 for n in levels), False)
    reader.done()
    return ComponentConfig("clip", "clip", config)


def _dinov2(place: Path, r: Reader, side: int, options: Options) -> ComponentConfig:
    data = read_json(place / "config.json")
    reader = Reader(data, str(place / "config.json"), options.ignore_keys)
    depth = reader.count("num_hidden_layers", 12, most=MOST_LAYERS)
    levels = _levels(r, "dinov2_levels", depth, range(depth * 3 // 4, depth))
    config = dinov2.Config.read(reader, tuple(n + 1 for n in levels), False, image_size=side)
    reader.done()
    return ComponentConfig("dinov2", "dinov2", config)


def _tower(eye: ComponentConfig, place: Path, options: Options) -> ComponentTensors:
    stored, unused = towers.stored_in(eye, place, options)
    check([stored], unused)
    return stored


def _read_lm(folder: Path, options: Options) -> ComponentConfig:
    data = read_json(folder / "config.json")
    reader = Reader(data, str(folder / "config.json"), options.ignore_keys)
    kind = _LMS[reader.choice("model_type", list(_LMS))]
    config = models.lm(kind).Config.read(reader)
    reader.done()
    return ComponentConfig("lm", kind, config)


def _read_merger(
    r: Reader, eyes: Mapping[str, ComponentConfig], outputs: int, side: int
) -> ComponentConfig:
    merge = r.choice("merge", _MERGES, "norm_linear")
    scale = r.choice("scale", ("softmax", "raw"), "softmax")
    depth, ratio = r.count("mlp_depth", 1, least=0), r.count("mlp_ratio", 4)
    tokens = {eye.config.tokens for eye in eyes.values()}
    if len(tokens) != 1:
        raise ConfigError(
            f"{r.where}: CLIP gives {eyes['clip'].config.tokens} tokens and DINOv2 "
            f"{eyes['dinov2'].config.tokens} for images of {side}",
            hint="choose image_size so that both grids are equal, as 336 with patches of 14",
        )
    branches = tuple(
        comm.Branch(
            name,
            tuple(tap - 1 for tap in eye.config.taps),
            eye.config.hidden_size,
            merge,  # type: ignore[arg-type]
            scale,  # type: ignore[arg-type]
            mlp_depth=depth if name == "dinov2" else 0,
            mlp_ratio=ratio,
        )
        for name, eye in eyes.items()
    )
    eps = r.positive("layer_norm_eps", 1e-5)
    return ComponentConfig(
        "merger", "comm", comm.Config(branches, outputs, math.isqrt(tokens.pop()), eps)
    )


def _pixels(
    r: Reader, places: Mapping[str, Path], side: int, options: Options
) -> dict[str, Preprocess]:
    """One image for both: CLIP's geometry, each tower's own mean and deviation."""
    aspect = r.choice("image_aspect_ratio", ("pad", "square"), "pad")
    first = towers.read_rule(places["clip"], options)
    if first.size != (side, side):
        raise ConfigError(
            f"{places['clip']} makes images of {first.size}, config.json says {side}",
            hint="set image_size to what the CLIP tower was trained for",
        )
    first = first.padded() if aspect == "pad" else first
    other = towers.read_rule(places["dinov2"], options)
    return {"clip": first, "dinov2": replace(first, mean=other.mean, std=other.std)}


def _tokenizer(folder: Path, lm: ComponentConfig, wrapped: bool) -> tuple[str, bool]:
    text, doubled = read_tokenizer(folder, slow=True)
    text = add_tokens(text, ["<im_start>", "<im_end>"] * wrapped, lm.config.vocab_size)
    check_tokenizer(text, lm.config.vocab_size, str(folder))
    if wrapped and '"<im_start>"' not in text:
        raise ConfigError(
            f"{folder}: the model has no row for <im_start>, which surrounds images",
            hint="set use_im_start_end to false in config.json if it was trained without",
        )
    return text, doubled


def _preset(name: str, lm: llama.Config) -> ModelConfig:
    levels = {"clip": tuple(range(24)), "dinov2": tuple(range(18, 24))}
    base = {"clip": presets.CLIP_L_336, "dinov2": presets.DINOV2_L_336}
    eyes = [
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
        eyes,
        ComponentConfig("merger", "comm", comm.Config(branches, lm.hidden_size, 24)),
        lm,
        ImageRules({"clip": rule, "dinov2": replace(rule, mean=other.mean, std=other.std)}),
    )


PRESETS = presets.with_sibling("comm-7b", presets.VICUNA_7B, _preset)
