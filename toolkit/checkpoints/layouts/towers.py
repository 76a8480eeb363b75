"""The vision tower of a LLaVA checkpoint: its folder, its encoder, and the levels that are used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints import hub
from edgevlm.toolkit.checkpoints.layouts.source import (
    ComponentTensors,
    Options,
    below,
    find_prefix,
    read_encoder,
)
from edgevlm.toolkit.checkpoints.weights import Checkpoint, open_checkpoint, open_file
from edgevlm.toolkit.errors import CheckpointError, ConfigError, ToolkitError
from edgevlm.toolkit.images.preprocess import Preprocess, read_preprocess
from edgevlm.toolkit.models.encoders import unireplknet
from edgevlm.toolkit.strict import MOST_LAYERS, Reader, read_json
from edgevlm.toolkit.vlm.config import ComponentConfig

Taps = tuple[int, ...]


@dataclass(frozen=True)
class Tower:
    """An encoder with its preprocessing and tensors; unused: globs of tensors that are not read."""

    encoder: ComponentConfig
    preprocess: Preprocess
    tensors: ComponentTensors
    unused: tuple[str, ...]


# What a file of image and text towers holds beside the image tower.
TEXT = ("text_model.*", "logit_scale", "logit_bias", "text_projection.*", "visual_projection.*")

# Towers that published checkpoints name and edgevlm has no file for: a pattern in the name, and
# what it is. They come without a folder of their own, so no config.json can say it.
_FOREIGN = {
    r"mobileclip": "MobileCLIP (FastVLM's FastViT)",
    r"imagebind": "ImageBind",
    r"eva[-_]?(02|clip)": "EVA-CLIP",
    r"intern[-_]?vit": "InternViT",
    r"languagebind": "LanguageBind (video)",
    r"openclip|open_clip_hub": "OpenCLIP in its own format",
}


def name_in(config: Mapping[str, Any], where: str) -> str:
    """The value of `mm_vision_tower`. Raises ConfigError unless it is a name."""
    name = config.get("mm_vision_tower")
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(
            f"{where}: mm_vision_tower = {name!r}, expected the name or folder of a vision tower",
            hint="set it to the tower that the checkpoint was trained with, such as "
            "openai/clip-vit-large-patch14-336",
        )
    return name


def _refuse_foreign(name: str, folder: Path) -> None:
    """Raise ConfigError for a tower whose name says that it is of a kind we do not implement."""
    for pattern, kind in _FOREIGN.items():
        if re.search(pattern, name, re.IGNORECASE):
            raise ConfigError(
                f"{folder / 'config.json'}: the vision tower {name!r} is {kind}, which edgevlm "
                "does not implement",
                hint=f"implemented: {', '.join(models.kinds('encoders'))}",
            )


def find(name: str, folder: Path, options: Options) -> Path:
    """The tower that `mm_vision_tower` names: a folder with config.json, or a weight file.

    --vision-tower decides if it is given; else the tower is looked for inside the checkpoint,
    beside it, from the current folder, and, if its name is a model id, in the hub's cache; unless
    `options.offline`, it is downloaded then. Raises CheckpointError if it is not found.
    """
    chosen = options.vision_tower
    if chosen is not None:
        is_path = chosen.exists() or not hub.is_model_id(str(chosen))
        return chosen if is_path else hub.locate_tower(str(chosen), offline=options.offline)
    base = PureWindowsPath(name).name  # either separator: it may be a path of the trainer's machine
    for path in (folder / name, folder.parent / name, Path(name), folder / base,
                 folder.parent / base):  # fmt: skip
        if path.is_file() or (path / "config.json").exists():
            return path
    _refuse_foreign(name, folder)
    reason, download = "", ""
    if hub.is_model_id(name):
        try:
            return hub.locate_tower(name, offline=options.offline)
        except ToolkitError as missing:
            reason, download = f" ({missing.message})", f"; or: {missing.hint}"
    raise CheckpointError(
        f"the vision tower {name!r} that {folder / 'config.json'} names is not on this machine"
        + reason,
        hint=f"put its folder beside {folder}, or name it: --vision-tower FOLDER{download}",
    )


def kind_of(config: Mapping[str, Any], folder: Path, options: Options) -> str:
    """The encoder file for the tower of a LLaVA configuration."""
    tower = find(name_in(config, str(folder / "config.json")), folder, options)
    if tower.is_file():
        return "unireplknet"
    return read_encoder(read_json(tower / "config.json"), str(tower / "config.json"), options)[0]


def open_tower(folder: Path, r: Reader, options: Options, choose: Callable[[Taps], Taps]) -> Tower:
    """The tower that config.json names, with the levels that it selects."""
    tower = find(name_in({"mm_vision_tower": r.raw("mm_vision_tower")}, r.where), folder, options)
    if tower.is_file():
        return _open_file(tower, r, options)
    path = tower / "config.json"
    data = read_json(path)
    kind, reader = read_encoder(data, str(path), options)
    stated = reader if reader.has("num_hidden_layers") else Reader(data, str(path))
    depth = stated.count("num_hidden_layers", 12, most=MOST_LAYERS)
    taps, class_token = read_taps(r, depth)
    config = models.encoder(kind).Config.read(reader, choose(taps), class_token)
    reader.done()
    encoder = ComponentConfig(kind, kind, config)
    rule = read_rule(tower, options)
    check_size(rule, encoder, str(tower))
    tensors, unused = tensors_in(encoder, tower, options)
    return Tower(encoder, rule, tensors, unused)


def read_rule(folder: Path, options: Options) -> Preprocess:
    """The preprocessing in a tower's folder."""
    path = folder / "preprocessor_config.json"
    reader = Reader(read_json(path), str(path), options.ignore_keys)
    rule = read_preprocess(reader)
    reader.done()
    return rule


def check_size(rule: Preprocess, encoder: ComponentConfig, where: str) -> None:
    """Raise ConfigError if the images are not of the size that the encoder takes."""
    if isinstance(encoder.config.pixels[0], int) and rule.size != encoder.config.pixels:
        raise ConfigError(
            f"{where}: preprocessor_config.json makes images of {rule.size}, the tower takes "
            f"{encoder.config.pixels}",
            hint="take config.json and preprocessor_config.json from the same tower",
        )


def tensors_in(
    encoder: ComponentConfig, folder: Path, options: Options
) -> tuple[ComponentTensors, tuple[str, ...]]:
    """The tower's tensors in its own folder, and globs of those there that are not read."""
    file = models.encoder(encoder.kind)
    checkpoint = open_checkpoint(folder, options.torch_reader)
    table = file.names(encoder.config)
    prefix = find_prefix(table, checkpoint, "vision_model.", "")
    unused = tuple(prefix + glob for glob in file.unused(encoder.config))
    return ComponentTensors(below(table, prefix), file.shapes(encoder.config), checkpoint), (
        *unused,
        *TEXT,
    )


def _open_file(path: Path, r: Reader, options: Options) -> Tower:
    """UniRepLKNet: sizes come from the weights; select layer and select feature have no effect."""
    r.skip("mm_vision_select_layer", "mm_vision_select_feature")
    source = open_file(path, options.torch_reader)
    keys = list(source.keys())
    checkpoint = Checkpoint(dict.fromkeys(keys, source), str(path))
    config = unireplknet.Config.of({key: source.shape(key) for key in keys}, str(path))
    tensors = ComponentTensors(unireplknet.names(config), unireplknet.shapes(config), checkpoint)
    encoder = ComponentConfig("unireplknet", "unireplknet", config)
    return Tower(encoder, read_rule(path.parent, options), tensors, unireplknet.unused(config))


# -- levels ------------------------------------------------------------------------------------


def selected(raw: Any) -> Taps | None:
    """The layers of mm_vision_select_layer, written as -2, "-2", [-22, …] or "list-22/-17/…".

    None for anything else.
    """
    if isinstance(raw, str):
        try:
            raw = [int(n) for n in raw[4:].split("/")] if raw.startswith("list") else int(raw)
        except ValueError:
            return None
    if isinstance(raw, list) and raw and all(isinstance(n, int) for n in raw):
        return tuple(raw)
    return (raw,) if isinstance(raw, int) and not isinstance(raw, bool) else None


def read_taps(r: Reader, depth: int) -> tuple[Taps, bool]:
    """The hidden states that the configuration selects, and whether the class token is kept.

    slicefour: one state per quarter of the tower, from the select layer on; slice_m25811_f6:
    states -2, -5, -8, -11 and 6. Both are concatenated on channels. Raises ConfigError.
    """
    taps = selected(r.raw("mm_vision_select_layer"))
    if taps is None:
        raise ConfigError(
            f"{r.where}: mm_vision_select_layer = {r.raw('mm_vision_select_layer')!r} is missing "
            "or names no layer",
            hint="it is a number such as -2, or a list such as [-22, -17, -12, -7, -2]",
        )
    known = [f"{states}{tokens}" for states in ("", "slicefour_", "slice_m25811_f6_")
             for tokens in ("patch", "cls_patch")]  # fmt: skip
    if r.given("mm_vision_select_feature") and not r.has("mm_vision_select_feature"):
        raise ConfigError(
            f"{r.where}: mm_vision_select_feature is null, and the original refuses that",
            hint='set it to "patch", or to "cls_patch" if training kept the class token',
        )
    feature = r.choice("mm_vision_select_feature", known, "patch")
    if feature.startswith("slicefour"):
        step = (depth + 1) // 4
        taps = tuple(range(step + taps[0], depth + 1, step))
    elif feature.startswith("slice_m25811"):
        taps = (-2, -5, -8, -11, 6)
    return taps, feature.endswith("cls_patch")
