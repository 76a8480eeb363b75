"""Vision towers by themselves: published folders of transformers, and weight files of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints import hub
from edgevlm.toolkit.checkpoints.layouts import native_mlcd, towers, unicom_file
from edgevlm.toolkit.checkpoints.layouts.source import (
    ComponentTensors,
    Options,
    TowerSource,
    below,
    check,
    find_prefix,
    read_encoder,
)
from edgevlm.toolkit.checkpoints.weights import Checkpoint, open_checkpoint, open_file
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.images.preprocess import ImageRules, Preprocess
from edgevlm.toolkit.models.encoders import mlcd, unicom, unireplknet
from edgevlm.toolkit.strict import from_plain, read_json
from edgevlm.toolkit.vlm import presets
from edgevlm.toolkit.vlm.config import ComponentConfig
from edgevlm.toolkit.vlm.towers import TowerConfig

# Before a tower's names in a whole CLIP, in a classifier, and in what training programs saved.
_PREFIXES = ("vision_model.", "", "dinov2.", "dinov2_with_registers.", "convnext.", "unicom.")
_BESIDE = (*towers.TEXT, "classifier.*", "*position_ids")


def is_tower(folder: Path) -> bool:
    """Whether config.json describes a vision tower and nothing around it."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    kind = read_json(path).get("model_type")
    return isinstance(kind, str) and any(
        kind in models.encoder(name).MODEL_TYPES for name in models.kinds("encoders")
    )


def load(path: Path, options: Options) -> TowerSource:
    """The tower in a folder or in a weight file. Raises ConfigError or CheckpointError."""
    _refuse_foreign(path, options)
    tower = _of_file(path, options) if path.is_file() else _of_folder(path, options)
    kind, config, rule, checkpoint, prefix, native = tower
    file = models.tower(kind)
    pooling = _pooling(kind, checkpoint, prefix, options)
    names = mlcd.native_embed_names(config) if native else file.embed_names(config, pooling)
    tensors = ComponentTensors(below(names, prefix), file.embed_shapes(config, pooling), checkpoint)
    others = native_mlcd.UNUSED if native else file.embed_unused(config, pooling)
    unused = [prefix + glob for glob in others]
    check([tensors], (*unused, *(() if path.is_file() else _BESIDE)))
    name = path.stem if path.is_file() else hub.name_of(path)
    model = TowerConfig(
        name, kind, ComponentConfig(kind, kind, config), pooling, ImageRules({kind: rule})
    )
    origin: dict[str, Any] = {"layout": "file" if path.is_file() else "huggingface"}
    if (cached := hub.origin_in_cache(path)) is not None:
        origin |= {"model_id": cached[0], "revision": cached[1]}
    model = _with_quirks(model, options.quirks)
    origin |= {"quirks": list(options.quirks)} if options.quirks else {}
    return TowerSource(model, {f"encoder.{kind}": tensors.weights()}, origin)


class _Read(NamedTuple):
    """A tower that was recognised. native: in MLCD's own names, not those of transformers."""

    kind: str
    config: Any
    rule: Preprocess
    checkpoint: Checkpoint
    prefix: str
    native: bool = False


def _of_folder(folder: Path, options: Options) -> _Read:
    path = folder / "config.json"
    data = read_json(path)
    rule = towers.read_rule(folder, options)
    checkpoint = open_checkpoint(folder, options.torch_reader)
    kind, reader = read_encoder(data, str(path), options)
    if options.heads is not None:
        raise ConfigError(f"--heads {options.heads} is for weight files, {path} states them")
    config: Any
    if kind == "unicom":  # as `edgevlm train` saves one: our own fields
        plain = {key: value for key, value in data.items() if key != "model_type"}
        config = from_plain(unicom.Config, plain, str(path))
        unicom_file.check(config, checkpoint, "")
    elif kind == "unireplknet":
        config = unireplknet.Config.of(_shapes(checkpoint), str(folder))
    else:
        config = _published(kind, reader, rule)
    encoder = ComponentConfig(kind, kind, config)
    towers.check_size(rule, encoder, str(folder))
    file = models.tower(kind)
    prefix = find_prefix(file.embed_names(config, file.POOLINGS[-1]), checkpoint, *_PREFIXES)
    return _Read(kind, config, rule, checkpoint, prefix)


def _published(kind: str, reader: Any, rule: Preprocess) -> Any:
    """The configuration of a tower of transformers; DINOv2 takes images of any size."""
    given: dict[str, Any] = {}
    if kind == "dinov2":
        height, width = rule.size
        if height != width:
            raise ConfigError(f"{reader.where}: images of {rule.size} are not square")
        given = {"image_size": height}
    config = models.encoder(kind).Config.read(reader, (-1,), True, **given)
    reader.done()
    return config


def _of_file(path: Path, options: Options) -> _Read:
    source = open_file(path, options.torch_reader)
    checkpoint = Checkpoint(dict.fromkeys(source.keys(), source), str(path))
    prefix = unicom_file.prefix_in(checkpoint)
    if prefix is not None:
        config = unicom_file.config_of(checkpoint, prefix, options.heads)
        rule = presets.unicom_pixels(config.image_size)
        return _Read("unicom", config, rule, checkpoint, prefix)
    if options.heads is not None:
        raise ConfigError(f"--heads {options.heads} has no effect: {path} is no UNICOM")
    if any(key.startswith("stages.0.0.dwconv") for key in checkpoint.keys()):  # noqa: SIM118
        rule = towers.read_rule(path.parent, options)
        found = unireplknet.Config.of(_shapes(checkpoint), str(path))
        return _Read("unireplknet", found, rule, checkpoint, "")
    prefix = native_mlcd.prefix_in(checkpoint)
    if prefix is not None:
        if not (path.parent / "preprocessor_config.json").exists():
            raise ConfigError(
                f"{path} is an MLCD in its native names, which state no size of images",
                hint="put the preprocessor_config.json of the published tower beside it",
            )
        rule = towers.read_rule(path.parent, options)
        mlcd_config = native_mlcd.config_of(checkpoint, prefix, rule.size)
        return _Read("mlcd", mlcd_config, rule, checkpoint, prefix, native=True)
    raise _unknown(path, checkpoint)


def _unknown(path: Path, checkpoint: Checkpoint) -> CheckpointError:
    first = ", ".join(sorted(checkpoint.keys())[:3]) or "nothing"
    return CheckpointError(
        f"{path} is no tower file that is known: it holds {first}",
        hint="files: UNICOM's .pt, MLCD's, UniRepLKNet's; other towers are folders with "
        "config.json and preprocessor_config.json",
    )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {key: checkpoint.shape(key) for key in checkpoint.keys()}  # noqa: SIM118


def _pooling(kind: str, checkpoint: Checkpoint, prefix: str, options: Options) -> str:
    """The pooling that was asked for, or the usual one of what the file holds."""
    known = models.tower(kind).POOLINGS
    if options.pooling is not None:
        if options.pooling not in known:
            raise ConfigError(
                f"--pooling {options.pooling!r}: a {kind} tower has none of that name",
                hint=f"known: {', '.join(known)}",
            )
        return options.pooling
    needs = {"siglip": "head.probe", "unireplknet": "norm.weight"}  # of the usual pooling
    bare = kind in needs and prefix + needs[kind] not in checkpoint
    return known[bare]


def _refuse_foreign(path: Path, options: Options) -> None:
    """Raise ConfigError for options of vision-language models."""
    given = {
        "--system": options.system,
        "--vision-tower": options.vision_tower,
        "--base": options.base,
        "--max-context": options.max_context,
    }
    chosen = [option for option, value in given.items() if value]
    if chosen:
        raise ConfigError(
            f"{path} is a vision tower by itself; {', '.join(chosen)} is for models with a "
            "language model",
            hint="leave it out",
        )


def _with_quirks(model: TowerConfig, names: tuple[str, ...]) -> TowerConfig:
    for name in names:
        if name != "ignore-exif":
            raise ConfigError(f"a tower has no quirk {name!r}", hint="known: ignore-exif")
        model = replace(model, images=replace(model.images, upright=False))
    return model
