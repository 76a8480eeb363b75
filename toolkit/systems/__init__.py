"""Published systems, one file each, found by file name; config.json tells which one a folder is."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from edgevlm.toolkit.bundle import mistaken, trained
from edgevlm.toolkit.bundle import source as bundle_source
from edgevlm.toolkit.bundle.manifest import MANIFEST
from edgevlm.toolkit.checkpoints import hub, packed, partial
from edgevlm.toolkit.checkpoints.layouts import huggingface, lone_tower, original, quirks, towers
from edgevlm.toolkit.checkpoints.layouts.source import (
    AnySource,
    Options,
    Source,
    random_source,
    random_tower,
    with_context,
)
from edgevlm.toolkit.checkpoints.packed import Packing
from edgevlm.toolkit.checkpoints.weights import FLOAT_WEIGHTS, refuse_pointer
from edgevlm.toolkit.errors import CheckpointError, ConfigError, nearest
from edgevlm.toolkit.strict import read_json
from edgevlm.toolkit.vlm import language_models, tower_presets
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.toolkit.vlm.presets import tokenizer


class System(Protocol):
    """What every system file offers."""

    PRESETS: Mapping[str, Callable[[], ModelConfig]]

    def claims(self, folder: Path, config: Mapping[str, Any], options: Options) -> bool: ...

    def load(self, folder: Path, config: Mapping[str, Any], options: Options) -> Source: ...


def names() -> list[str]:
    """All systems."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]))


def find(name: str) -> System:
    """The system file called `name`. Raises ConfigError naming the known ones."""
    if name not in names():
        raise ConfigError(f"there is no system {name!r}", hint=f"known: {', '.join(names())}")
    return cast(System, import_module(f"edgevlm.toolkit.systems.{name}"))


def load_any(path: Path, options: Options) -> AnySource:
    """As `load`, and towers by themselves too: their folders, weight files and bundles.

    Raises what `load` raises, and ConfigError for options of towers where there is none.
    """
    if (path / MANIFEST).exists():
        source = bundle_source.load_any(path, options)
        return quirks.keep(source, {}, options.quirks) if isinstance(source, Source) else source
    if path.is_file() or lone_tower.is_tower(path):
        return lone_tower.load(path, options)
    for option, value in (("--heads", options.heads), ("--pooling", options.pooling)):
        if value is not None:
            raise ConfigError(f"{option} {value} is for towers by themselves, {path} is none")
    return load(path, options)


def load(folder: Path, options: Options) -> Source:
    """Read a checkpoint of any published system, or a bundle or trained checkpoint of ours.

    Raises ConfigError, CheckpointError or BundleError.
    """
    if (folder / MANIFEST).exists():
        return quirks.keep(bundle_source.load(folder, options), {}, options.quirks)
    if trained.is_trained(folder):
        return quirks.keep(trained.load(folder, options), {}, options.quirks)
    if options.base is None:
        partial.refuse_alone(folder)
    else:
        base = hub.locate_part(str(options.base), offline=options.offline)
        options = replace(options, base=base)
    config, options = _config(folder, options)
    stated = config.get("model_type")
    if not isinstance(stated, (str, type(None))):
        raise ConfigError(f"{folder / 'config.json'}: model_type = {stated!r}, expected a name")
    name = options.system or _detect(folder, config, options)
    source = _named(find(name).load(folder, config, options), folder)
    if options.packing is not None and "quantization" not in source.origin:
        raise _quantized(folder, options.packing.method)  # this system reads none
    return quirks.keep(source, config, options.quirks)


def _named(source: Source, folder: Path) -> Source:
    """A model from the hub's cache under its own name; its folder is called by a revision."""
    found = hub.origin_in_cache(folder)
    if found is None:
        return source
    name, revision = found
    model = replace(source.model, name=name.split("/")[-1])
    return replace(
        source, model=model, origin={**source.origin, "model_id": name, "revision": revision}
    )


def _config(folder: Path, options: Options) -> tuple[dict[str, Any], Options]:
    """config.json of the folder, or of the base where an adapter has none of its own.

    Its quantization_config is taken out and put into the options, if its weights can be read.
    Raises CheckpointError for files that a clone without git-lfs lacks, and ConfigError for
    weights that another program quantized in a way that is not implemented.
    """
    home = folder
    if options.base is not None and not (folder / "config.json").exists():
        home = options.base
    if not (home / "config.json").exists():
        kind = "has no config.json" if home.is_dir() else "does not exist"
        raise CheckpointError(f"{home} {kind}", hint=mistaken.instead_of_checkpoint(home))
    for name in ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        for place in {home, options.base or folder}:
            refuse_pointer(place / name)
    config = read_json(home / "config.json")
    if "quantization_config" in options.ignore_keys:
        return config, options
    sections = [
        section for section in (config, config.get("text_config")) if isinstance(section, dict)
    ]
    packing: Packing | None = None
    for section in sections:
        made = section.get("quantization_config")
        if made:
            packing = _packing(home, made, packing, options)
            del section["quantization_config"]  # it is read
    return config, replace(options, packing=packing)


def _packing(home: Path, made: Any, before: Packing | None, options: Options) -> Packing:
    """How weights are packed that another program quantized.

    before: what another section of the same config.json says, which must be the same.
    """
    method = made.get("quant_method") if isinstance(made, dict) else made
    taken = isinstance(made, dict) and method in packed.METHODS and options.base is None
    found = packed.read(made, str(home / "config.json"), options.ignore_keys) if taken else None
    if found is None or before not in (None, found):
        raise _quantized(home, method)
    return found


def _quantized(home: Path, method: object) -> ConfigError:
    return ConfigError(
        f"{home} holds weights that another program quantized: quantization_config names "
        f"{method!r}",
        hint=FLOAT_WEIGHTS,
    )


def _detect(folder: Path, config: Mapping[str, Any], options: Options) -> str:
    claiming = [name for name in names() if find(name).claims(folder, config, options)]
    if len(claiming) == 1:
        return claiming[0]
    if not claiming:
        raise CheckpointError(
            f"{folder} is of no system that edgevlm knows: {_why_none(folder, config, options)}",
            hint=f"known: {', '.join(names())} (docs/systems.md)",
        )
    raise CheckpointError(
        f"{folder} (model_type {config.get('model_type')!r}) could be any of: "
        f"{', '.join(claiming)}",
        hint=f"say which: --system {claiming[0]}",
    )


def _why_none(folder: Path, config: Mapping[str, Any], options: Options) -> str:
    """What a folder is that no system claims: its class, and the first thing that does not fit."""
    model_type, classes = config.get("model_type"), config.get("architectures")
    stated = f"model_type {model_type!r}, architectures {classes!r}"
    if original.is_original(config):
        tower = towers.kind_of(config, folder, options)
        return f"no system has a tower of kind {tower!r} ({config['mm_vision_tower']!r}) in LLaVA"
    if huggingface.names_class(config) and "text_config" in config:
        return f"{stated}: the model_type is not that class's"
    if "video" in f"{model_type} {classes}".lower():
        return f"{stated} is a model of videos"
    if "mm_vision_tower" in config or "text_config" in config:
        return f"{stated} is not implemented"
    if lone_tower.is_tower(folder):
        return f"{stated} is a vision tower by itself (export and embed take it)"
    if model_type in language_models.MODEL_TYPES:
        return f"{stated} is a language model alone, without a vision tower"
    return f"{stated} is not implemented, and it names no mm_vision_tower and no text_config"


def check_weights(name: str, random: bool) -> None:
    """Raise ConfigError unless --random-weights is given for presets, and for them alone."""
    is_preset = name.startswith("preset:")
    if is_preset and not random:
        raise ConfigError(f"{name} has no weights", hint="add --random-weights")
    if random and not is_preset:
        raise ConfigError(
            f"{name} has weights of its own; --random-weights is for presets",
            hint="drop --random-weights",
        )


def presets() -> dict[str, str]:
    """Every preset and the system that it belongs to."""
    return {preset: name for name in names() for preset in find(name).PRESETS}


def any_preset(name: str, seed: int, options: Options) -> AnySource:
    """As `preset`, and towers by themselves, for which options of models are a ConfigError."""
    if name not in tower_presets.PRESETS:
        return preset(name, seed, options)
    if options != Options(torch_reader=options.torch_reader, offline=options.offline):
        raise ConfigError(f"preset:{name} is a tower by itself and takes no options of models")
    return random_tower(tower_presets.PRESETS[name], seed, name)


def preset(name: str, seed: int, options: Options) -> Source:
    """A published shape with random weights.

    Raises ConfigError for options of checkpoints, and for an unknown name with the nearest ones.
    """
    for_checkpoints = {
        "--system": options.system,
        "--vision-tower": options.vision_tower,
        "--base": options.base,
        "--ignore-key": options.ignore_keys,
        "--quirk": options.quirks,
        "--heads": options.heads,
        "--pooling": options.pooling,
    }
    chosen = [option for option, value in for_checkpoints.items() if value]
    if chosen:
        raise ConfigError(f"{', '.join(chosen)} is for checkpoints, preset:{name} is none")
    known = presets()
    if name not in known:
        every = [*known, *tower_presets.PRESETS]
        close = nearest(name, every) or sorted(every)
        raise ConfigError(f"there is no preset {name!r}", hint=f"known: {', '.join(close)}")
    model = find(known[name]).PRESETS[name]()
    model = replace(model, lm=with_context(model.lm, options.max_context))
    return random_source(model, seed, tokenizer(model), name)
