"""The tower that a training begins with: published folders and files, or random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints import hub
from edgevlm.toolkit.checkpoints.layouts import native_mlcd, unicom_file
from edgevlm.toolkit.checkpoints.layouts.source import Options, read_encoder
from edgevlm.toolkit.checkpoints.layouts.towers import read_rule
from edgevlm.toolkit.checkpoints.weights import Checkpoint, open_checkpoint, open_file
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.models.encoders import unicom
from edgevlm.toolkit.strict import from_plain, read_json
from edgevlm.toolkit.vlm import tower_presets
from edgevlm.training.torch_files import TorchFile
from edgevlm.training.towers.files import read_tower
from edgevlm.training.towers.sizes import resized
from edgevlm.training.towers.tower import KINDS, Tower

RANDOM = "random:"
PRESETS: Mapping[str, tuple[str, Any]] = {
    **{name: ("unicom", config) for name, config in unicom.PUBLISHED.items()},
    **{name: ("clip", c) for name, c in tower_presets.CLIP.items() if name.startswith("clip")},
    "mlcd-bigg14-336": ("mlcd", tower_presets.MLCD["mlcd-bigg-336"]),
}


def open_tower(
    model: str,
    *,
    image_size: int | None = None,
    drop_path: float = 0.0,
    recompute: bool = False,
    seed: int = 0,
    ignore_keys: Sequence[str] = (),
    offline: bool = False,
) -> Tower:
    """The tower that `model` names, in float32.

    model: a folder or model id of a CLIP or MLCD tower, or of a UNICOM that was saved here; a .pt
    file of UNICOM, or of MLCD in its native names; random:PRESET; or random:KIND=FILE, where FILE
    is a config.json. image_size: resize to it. Raises ConfigError and CheckpointError.
    """
    options = Options(ignore_keys=tuple(ignore_keys), offline=offline)
    checkpoint: Checkpoint | None = None
    if model.startswith(RANDOM):
        kind, config = _random(model.removeprefix(RANDOM), options)
    elif Path(model).is_file():
        checkpoint = _file(Path(model))
        kind, config = _in_file(checkpoint, Path(model), image_size, options)
    else:
        folder = hub.locate(model, revision=None, offline=offline)
        kind, config = _described(folder / "config.json", options)
        checkpoint = open_checkpoint(folder, TorchFile)
    tower = Tower(kind, config, drop_path=drop_path, recompute=recompute, seed=seed)
    if checkpoint is not None:
        read_tower(tower, checkpoint)
    same = image_size is None or config.pixels == (image_size, image_size)
    return tower if same or image_size is None else resized(tower, image_size)


def _random(text: str, options: Options) -> tuple[str, Any]:
    name, equals, file = text.partition("=")
    if not equals and name in PRESETS:
        return PRESETS[name]
    if not equals or name not in KINDS:
        raise ConfigError(
            f"there is no tower {RANDOM}{text}",
            hint=f"random:PRESET of {', '.join(PRESETS)}; or random:KIND=config.json, "
            f"KIND one of {', '.join(KINDS)}",
        )
    kind, config = _described(Path(file), options)
    if kind != name:
        raise ConfigError(f"{file} describes a {kind} tower, not {name}")
    return kind, config


def _described(path: Path, options: Options) -> tuple[str, Any]:
    """Kind and configuration that a config.json states; UNICOM's are our own fields."""
    data = read_json(path)
    if data.get("model_type") == "unicom":
        plain = {key: value for key, value in data.items() if key != "model_type"}
        return "unicom", from_plain(unicom.Config, plain, str(path))
    kind, reader = read_encoder(data, str(path), options)
    if kind not in KINDS:
        raise ConfigError(f"{path} describes a {kind} tower", hint=f"trained here: {KINDS}")
    file: Any = models.encoder(kind)
    config = file.Config.read(reader, (-1,), True)
    reader.done()
    return kind, config


def _file(path: Path) -> Checkpoint:
    stored = open_file(path, TorchFile)
    return Checkpoint(dict.fromkeys(stored.keys(), stored), str(path))


def _in_file(
    checkpoint: Checkpoint, path: Path, image_size: int | None, options: Options
) -> tuple[str, Any]:
    """Kind and configuration of a weight file: UNICOM's, or MLCD's in its native names, which state
    no size of images: that is image_size, or the preprocessing's beside the file.
    """
    prefix = native_mlcd.prefix_in(checkpoint)
    if prefix is None or unicom_file.prefix_in(checkpoint) is not None:
        return "unicom", _unicom_config(checkpoint, path)
    beside = path.with_name("preprocessor_config.json")
    if image_size is None and not beside.exists():
        raise ConfigError(
            f"{path} is an MLCD in its native names, which state no size of images",
            hint="say it: --image-size; or put the preprocessor_config.json of the published tower "
            "beside it",
        )
    given = None if image_size is None else (image_size, image_size)
    size = given or read_rule(path.parent, options).size
    found = native_mlcd.config_of(checkpoint, prefix, size)
    return "mlcd", replace(found, taps=(found.num_layers,), class_token=True)


def _unicom_config(checkpoint: Checkpoint, path: Path) -> unicom.Config:
    """From the shapes of UNICOM's tensors, and a config.json beside the file if there is one."""
    beside = path.with_name("config.json")
    if beside.exists() and read_json(beside).get("model_type") == "unicom":
        config: unicom.Config = _described(beside, Options())[1]
        return config
    prefix = unicom_file.prefix_in(checkpoint)
    if prefix is None:
        raise CheckpointError(
            f"{path} is no UNICOM: it has no tensor patch_embed.proj.weight",
            hint="CLIP towers are read from their folders",
        )
    hidden = checkpoint.shape(f"{prefix}patch_embed.proj.weight")[0]
    if hidden not in unicom_file.HEADS:
        raise ConfigError(
            f"{path} has {hidden} channels, and does not say how many heads",
            hint="put the config.json of a UNICOM that was saved here beside it",
        )
    return unicom_file.config_of(checkpoint, prefix)
