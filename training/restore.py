"""Trained weights in the layout of the published folder from which training started.

Tensors have the published names and shapes. What training did not change, and what edgevlm does
not read, is copied bit for bit; so are tokenizer and settings. A tower that did not train stays
where it is and config.json names it; docs/systems.md says where a trained one is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath
from typing import Any

from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle import trained as trained_checkpoint
from edgevlm.toolkit.bundle.atomic import refuse_source, writing
from edgevlm.toolkit.bundle.manifest import MANIFEST
from edgevlm.toolkit.checkpoints import edited, hub
from edgevlm.toolkit.checkpoints.edited import Edited, Item, Part
from edgevlm.toolkit.checkpoints.layouts import towers
from edgevlm.toolkit.checkpoints.layouts.original import IN_CHECKPOINT
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.checkpoints.weights import Checkpoint, Recipes
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.models.encoders import convnext
from edgevlm.toolkit.strict import read_json
from edgevlm.toolkit.vlm import language_models
from edgevlm.toolkit.vlm.components import after_answer
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.training import assemble, grown

TOWER = "vision_tower"
_FINAL_NORM = ("layernorm.", "vision_model.layernorm.")
_COPIED = (".json", ".model", ".txt", ".jinja")
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class _Job:
    """One restoring: what is written where.

    config: config.json of the original, home: the folder of its other files, out: the folder that
    is written, final: its name when it is complete.
    """

    trained: Source
    original: Source
    config: Mapping[str, Any]
    home: Path
    options: Options
    dtype: str
    out: Path
    final: Path


def write_original(
    out: Path,
    trained: Source,
    original_folder: Path,
    options: Options,
    *,
    dtype: str | None = None,
    force: bool = False,
) -> None:
    """Write `trained` as the new folder `out`, in the layout of `original_folder`.

    original_folder: the published folder that training started from, read with `options`; for a
    model that `assemble` made, its language model's; or a trained checkpoint of an earlier stage
    whose origin names that folder (as `folder`, or in `assembled`). dtype: of the tensors that
    changed; by default that of the trained checkpoint. Raises ConfigError if the folder is of
    another model, CheckpointError for weights that the layout cannot hold, OutputError.
    """
    dtype = dtype or str(trained.origin.get("dtype", "fp32"))
    if dtype not in _TORCH_NAMES:
        raise ConfigError(f"dtype = {dtype!r}, expected one of {', '.join(_TORCH_NAMES)}")
    original_folder = _published(original_folder)
    config, home, original = _open(trained, original_folder, options)
    _check_same_model(trained, original, original_folder)
    refuse_source(out, original_folder)
    with writing(out, force=force) as partial:
        job = _Job(
            trained,
            original,
            config,
            home,
            options,
            dtype,
            partial,
            out.resolve(),
        )
        layouts = {"llava": _write_llava, "huggingface": _write_huggingface, "comm": _write_comm}
        new = layouts[str(original.origin["layout"])](job)
        (partial / "config.json").write_text(json.dumps(new, indent=2) + "\n", "utf-8")


def _published(folder: Path) -> Path:
    """The published folder that a trained checkpoint began with; any other folder itself.

    Raises ConfigError if the checkpoint does not name it, or it is gone.
    """
    if not trained_checkpoint.is_trained(folder):
        return folder
    origin = trained_checkpoint.read_description(folder).origin
    named = origin.get("assembled", {}).get("language_model") or origin.get("folder")
    if named is None or not Path(str(named)).is_dir():
        why = "does not name the folder" if named is None else f"names {named}, which is not here,"
        raise ConfigError(
            f"{folder} is a trained checkpoint and {why} that its first stage began with",
            hint="name that published folder",
        )
    return Path(str(named))


def write_run(
    out: Path, trained: Path, model: str, options: Options, say: Callable[[str], None]
) -> None:
    """Write the finished run `trained` as `out`, in the layout of the model that it began with."""
    say(f"writing {out}")
    refuse_source(out, trained)
    home = hub.locate(model, revision=None, offline=options.offline)
    write_original(out, systems.load(trained, options), home, options)


def _open(
    trained: Source, folder: Path, options: Options
) -> tuple[Mapping[str, Any], Path, Source]:
    """config.json, the folder with the tokenizer, and the model as it was before training."""
    facts = trained.origin.get("assembled")
    home = options.base or folder
    path = next((p for p in (folder, home) if (p / "config.json").exists()), folder)
    config = read_json(path / "config.json")
    alone = config.get("model_type") in language_models.MODEL_TYPES
    if facts is not None and alone and "mm_vision_tower" not in config:
        parts = assemble.Parts.from_facts(facts, folder, options)
        return assemble.published_config(parts, options), home, assemble.open_model(parts, options)
    return config, home, systems.load(folder, options)


def _check_same_model(trained: Source, original: Source, folder: Path) -> None:
    """Raise ConfigError if the folder holds another model than training started from."""
    ours, theirs = trained.model, grown.as_grown(original.model, trained.model)
    pairs: dict[str, tuple[Any, Any]] = {
        "system": (ours.system, theirs.system),
        "encoders": (ours.encoders, theirs.encoders),
        "merger": (ours.merger, theirs.merger),
        "segmenter": (ours.segmenter, theirs.segmenter),
        "language model": (_any_context(ours), _any_context(theirs)),
        "tiles of images": (
            (ours.images.tiling, ours.images.arrangement),
            (theirs.images.tiling, theirs.images.arrangement),
        ),
        "preprocessing": (dict(ours.images.encoders), dict(theirs.images.encoders)),
        "tokenizer": (trained.tokenizer, original.tokenizer),
    }
    for name, (mine, its) in pairs.items():
        if mine != its:
            told = f" ({mine} there, {its} here)" if name == "system" else ""
            raise ConfigError(
                f"{folder} is not what the trained model was made from: its {name} is another"
                f"{told}",
                hint="name the folder that the training started from",
            )


def _any_context(model: ModelConfig) -> Any:
    return replace(model.lm, config=replace(model.lm.config, context=0))


def _recipes(source: Source, component: str) -> tuple[Recipes, Checkpoint]:
    """A component's recipes, and the checkpoint that they read."""
    weights = source.weights[component]
    if not isinstance(weights, Recipes) or not isinstance(weights.checkpoint, Checkpoint):
        raise ConfigError(
            f"the {component} of the original is changed while it is read",
            hint="read it without --quirk",
        )
    return weights, weights.checkpoint


def _part(job: _Job, component: str) -> Part:
    return Part(_recipes(job.original, component)[0].table, job.trained.weights[component])


def _copy_files(source: Path, out: Path) -> None:
    """Configuration, tokenizer and the like; the weights are written anew."""
    for path in sorted(source.iterdir()):
        weights = path.name.endswith(".index.json") or path.name in (
            trained_checkpoint.CHECKPOINT,
            MANIFEST,
        )
        if path.is_file() and path.suffix in _COPIED and not weights:
            shutil.copyfile(path, out / path.name)


def _stating_dtype(config: Mapping[str, Any], job: _Job, changed: bool) -> dict[str, Any]:
    """config.json with the dtype of changed tensors where it names one."""
    if not changed:
        return dict(config)
    name = _TORCH_NAMES[job.dtype]
    stated = {key: name for key in ("torch_dtype", "dtype") if isinstance(config.get(key), str)}
    sections = {
        key: _stating_dtype(config[key], job, changed)
        for key in ("text_config", "vision_config")
        if isinstance(config.get(key), dict)
    }
    return {**config, **stated, **sections}


def _tied_copies(job: _Job, stored: Checkpoint) -> dict[str, str]:
    """Stored copies of the embedding as lm_head, which a tied model ignores but must not belie."""
    if not job.trained.model.lm.config.tied:
        return {}
    (embed,) = _recipes(job.original, "lm")[0].table["embed.weight"].sources
    heads = [key for key in stored.keys() if key.endswith("lm_head.weight")]  # noqa: SIM118
    return {key: embed for key in heads if key != embed}


# -- Hugging Face --------------------------------------------------------------------------------


def _write_huggingface(job: _Job) -> dict[str, Any]:
    _copy_files(job.home, job.out)
    _, stored = _recipes(job.original, "lm")
    parts = [_part(job, name) for name in job.original.weights]
    tensors = Edited(stored, parts, job.dtype, _tied_copies(job, stored))
    edited.write(job.out, edited.items(tensors), like=stored)
    return _stating_dtype(job.config, job, tensors.changed())


# -- LLaVA's own ---------------------------------------------------------------------------------


def _write_llava(job: _Job) -> dict[str, Any]:
    _copy_files(job.home, job.out)
    tower = f"encoder.{job.trained.model.encoders[0].name}"
    _, stored = _recipes(job.original, "lm")
    own, tower_stored = _recipes(job.original, tower)
    inside = tower_stored is stored
    behind = sorted(after_answer(job.trained.model))  # of MLCD-Seg, whose SAM is inside
    names = ("lm", "merger", *([tower] if inside else []), *behind)
    parts = [_part(job, name) for name in names]
    tensors = Edited(stored, parts, job.dtype, _tied_copies(job, stored))
    listed = edited.items(tensors)
    path = towers.find(str(job.config["mm_vision_tower"]), job.home, job.options)
    config = _stating_dtype(job.config, job, tensors.changed())
    table = grown.table_of(job.trained.model, job.original.model, own.table)
    trained_tower = Edited(tower_stored, [Part(table, job.trained.weights[tower])], job.dtype)
    if inside or not (grown.differs(job.trained.model, job.original.model)
                      or trained_tower.changed(rounded=True)):  # fmt: skip
        config["mm_vision_tower"] = _reference(job, str(config["mm_vision_tower"]), path)
    elif job.trained.model.system == "convllava":
        config |= _write_tower(job, trained_tower, path)
    else:
        listed = [item for item in listed if not item.name.startswith(IN_CHECKPOINT)]
        listed += _below_checkpoint(trained_tower)
        config["unfreeze_mm_vision_tower"] = True  # the originals ignore weights in here without it
        config["mm_vision_tower"] = _reference(job, str(config["mm_vision_tower"]), path)
    edited.write(job.out, listed, like=stored)
    return config


def _below_checkpoint(tower: Edited) -> list[Item]:
    """A tower's tensors under the names that the LLaVA folder has for them."""
    keys = tower.keys()
    prefix = "vision_model." * any(key.startswith("vision_model.") for key in keys)
    mine = [key for key in keys if key.startswith(prefix)]
    return [
        Item(f"{IN_CHECKPOINT}vision_model.{key.removeprefix(prefix)}", tower, key)
        for key in mine
        if not any(fnmatchcase(key, glob) for glob in towers.TEXT)
    ]


def _write_tower(job: _Job, tower: Edited, path: Path) -> dict[str, Any]:
    """A convolutional tower as a folder beside the language model; the keys that name it.

    The originals take the name as a path from the current folder, so it is absolute; edgevlm also
    finds a folder of this name inside a checkpoint that was moved.
    """
    folder, model = job.out / TOWER, job.trained.model
    folder.mkdir()
    _copy_files(path.parent if path.is_file() else path, folder)
    changed = _stating_dtype(read_json(folder / "config.json"), job, tower.changed())
    if isinstance(model.encoders[0].config, convnext.Config):
        selected = towers.selected(job.config.get("mm_vision_select_layer"))
        changed = grown.tower_config(changed, model.encoders[0].config, selected)
        rule = read_json(folder / "preprocessor_config.json")
        rule = grown.tower_preprocessor(rule, model.images.encoders[model.encoders[0].name])
        (folder / "preprocessor_config.json").write_text(json.dumps(rule, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(changed, indent=2) + "\n")
    listed = edited.items(tower)
    if grown.differs(model, job.original.model):  # of the old width, and never applied
        listed = [item for item in listed if not item.key.startswith(_FINAL_NORM)]
    edited.write(folder, listed, like=tower.stored)
    name = job.final / TOWER
    if path.is_file():
        name = name / f"{path.stem}.safetensors"
    return {
        "mm_vision_tower": str(name),
        "mm_hidden_size": model.encoders[0].config.hidden_sizes[-1],
    }


def _reference(job: _Job, name: str, tower: Path) -> str:
    """How config.json of the new folder names a tower or language model that stays where it is.

    What lies inside the original folder is part of it and is copied.
    """
    inner = tower if tower.is_dir() else tower.parent
    inside = inner.resolve() != job.home.resolve()
    if inside and inner.resolve().is_relative_to(job.home.resolve()):
        local = inner.resolve().relative_to(job.home.resolve())
        shutil.copytree(inner, job.out / local, dirs_exist_ok=True)
        return f"./{local}" if tower.is_dir() else f"./{local}/{tower.name}"
    near = (job.final.parent / name, Path(name), job.final.parent / PureWindowsPath(name).name)
    found = next((path for path in near if path.exists()), None)
    if found is None and hub.is_model_id(name) and job.options.vision_tower is None:
        return name
    same = found is not None and found.resolve() == tower.resolve()
    return name if same else str(tower.resolve())


# -- COMM ----------------------------------------------------------------------------------------

_COMM = {"clip": "encoder.clip", "dinov2": "encoder.dinov2", "language_model": "lm"}


def _write_comm(job: _Job) -> dict[str, Any]:
    config = dict(job.config)
    _, merger = _recipes(job.original, "merger")
    edited.write(
        job.out,
        edited.items(Edited(merger, [_part(job, "merger")], job.dtype)),
        like=merger,
    )
    for key, component in _COMM.items():
        _, stored = _recipes(job.original, component)
        folder = Path(stored.where)
        copies = _tied_copies(job, stored) if component == "lm" else {}
        tensors = Edited(stored, [_part(job, component)], job.dtype, copies)
        if not tensors.changed(rounded=component != "lm"):
            config[key] = _reference(job, str(config[key]), folder)
            continue
        (job.out / key).mkdir()
        _copy_files(folder, job.out / key)
        edited.write(job.out / key, edited.items(tensors), like=stored)
        inner = _stating_dtype(read_json(folder / "config.json"), job, True)
        (job.out / key / "config.json").write_text(json.dumps(inner, indent=2) + "\n")
        config[key] = key
    return config
