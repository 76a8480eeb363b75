"""A new vision-language model from a language model and towers; its merger has initial values.

The configuration is the one that the original's training would have written, read by the same code
that reads published checkpoints: an assembled model is what its layout's loader would read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit import models, systems
from edgevlm.toolkit.checkpoints import hub
from edgevlm.toolkit.checkpoints.layouts import original, towers
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source, read_encoder
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.strict import read_json
from edgevlm.toolkit.vlm import language_models
from edgevlm.training import grown, initial
from edgevlm.training.stages import Stage

# Which towers a system is trained with; COMM takes one of each, the others any one of them.
TOWERS: Mapping[str, tuple[str, ...]] = {
    "comm": ("clip", "dinov2"),
    "convllava": ("convnext",),
    "llava": ("clip", "siglip"),
    "llava_next": ("clip", "siglip"),
    "mlcd": ("mlcd", "clip"),
    "mmfuser": ("clip",),
}
_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # tiles per width and height, as published
_TILED = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
_OF_SYSTEM: Mapping[str, Mapping[str, Any]] = {
    "convllava": {"mm_vision_select_layer": -1},
    "llava": {},
    "llava_next": _TILED,
    "mlcd": _TILED,
    "mmfuser": {"mm_vision_select_layer": [-22, -17, -12, -7, -2]},
}


@dataclass(frozen=True)
class Parts:
    """What a model is put together from.

    towers: folders by kind of encoder, as in TOWERS. overrides: keys of the original's config.json
    in place of the published values; and for convllava image_size, the side of its images.
    """

    system: str
    lm_folder: Path
    towers: Mapping[str, Path]
    seed: int = 0
    overrides: Mapping[str, Any] | None = None

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], lm_folder: Path, options: Options) -> Parts:
        """The parts that a checkpoint names under origin; --vision-tower replaces a lone tower."""
        folders = {str(name): Path(str(folder)) for name, folder in facts["towers"].items()}
        if options.vision_tower is not None and len(folders) == 1:
            folders = dict.fromkeys(folders, options.vision_tower)
        seed, overrides = int(facts.get("seed", 0)), facts.get("overrides", {})
        return cls(str(facts["system"]), lm_folder, folders, seed, overrides)

    def facts(self) -> dict[str, Any]:
        """The parts as JSON, for a checkpoint's origin."""
        return {
            "system": self.system,
            "language_model": str(self.lm_folder.resolve()),
            "towers": {name: str(folder.resolve()) for name, folder in self.towers.items()},
            "seed": self.seed,
            "overrides": dict(self.overrides or {}),
        }


def assemble(
    system: str,
    lm_folder: Path,
    towers: Mapping[str, Path],
    *,
    options: Options | None = None,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> Source:
    """A new model of `system`: weights of the folders are read when they are used.

    lm_folder: a language model (Vicuna, Qwen2, Mistral ...) with its tokenizer. towers: folders by
    kind of encoder; one of those in TOWERS, for comm both. seed: of the merger's initial values.
    overrides: keys of config.json in place of the published ones, and image_size for convllava.
    Raises ConfigError and CheckpointError naming what does not fit together.
    """
    parts = Parts(system, lm_folder, towers, seed, overrides)
    return open_model(parts, options or Options())


def from_parts(
    stage: Stage,
    lm: str,
    towers: Sequence[str],
    system: str | None,
    image_size: int | None,
    seed: int,
    options: Options,
) -> Source:
    """A new model for a stage: lm and towers (KIND=FOLDER) are folders or model ids.

    system: None for the stage's first. Raises ConfigError and CheckpointError.
    """
    folders = {}
    for text in towers:
        kind, equals, folder = text.partition("=")
        if not equals:
            raise ConfigError(f"--tower {text!r} is not KIND=FOLDER", hint="clip=FOLDER")
        folders[kind] = hub.locate(folder, revision=None, offline=options.offline)
    if system is None and not stage.systems:
        raise ConfigError(
            f"stage {stage.name} is for every system", hint="say which: --system comm"
        )
    home = hub.locate(lm, revision=None, offline=options.offline)
    changes = {} if image_size is None else {"image_size": image_size}
    return assemble(
        system or stage.systems[0], home, folders, options=options, seed=seed, overrides=changes
    )


def open_model(parts: Parts, options: Options) -> Source:
    """The model of `parts`. Raises ConfigError and CheckpointError."""
    if options.base is not None or options.system not in (None, parts.system):
        raise ConfigError(
            "--base and --system are for published checkpoints",
            hint="a new model is made from a language model and towers",
        )
    config = published_config(parts, options)

    def new_merger(merger: Any, shapes: Any) -> initial.Initial:
        return initial.merger(merger, shapes, parts.seed)

    options = replace(options, new_merger=new_merger, vision_tower=None)
    source = systems.find(parts.system).load(parts.lm_folder, config, options)
    model = replace(source.model, name=f"{parts.lm_folder.resolve().name}-{parts.system}")
    side = (parts.overrides or {}).get("image_size")
    if parts.system == "convllava" and side is not None:
        model = grown.resized(model, side)
    return replace(source, model=model, origin={**source.origin, "assembled": parts.facts()})


def with_settings(
    source: Source, overrides: Mapping[str, Any], *, options: Options | None = None
) -> Source:
    """A model that `assemble` made, trained or not, with other settings of config.json.

    LLaVA-NeXT's first stage shows one view of an image, its second one tiles: the weights stay, and
    a newline token that the new settings need begins as a new model's. overrides: beside those that
    the model has. The language model's folder, which its origin names, must still be there. Raises
    ConfigError for another model, and for settings under which weights would not fit.
    """
    facts = source.origin.get("assembled")
    if facts is None:
        raise ConfigError(
            f"{source.model.name} was not put together here, so its settings are its own folder's",
            hint="change config.json in that folder",
        )
    options = options or Options()
    parts = Parts.from_facts(facts, Path(str(facts["language_model"])), options)
    parts = replace(parts, overrides={**(parts.overrides or {}), **overrides})
    new = open_model(parts, options)
    fits = grown.as_grown(new.model, source.model)
    if (fits.encoders, fits.merger) != (source.model.encoders, source.model.merger):
        raise ConfigError(
            f"with {', '.join(overrides)} the weights of {source.model.name} do not fit",
            hint="such a setting is chosen when the model is put together",
        )
    merger = grown.Joined(new.weights["merger"], source.weights["merger"])
    kept = {key: merger[key] for key in new.weights["merger"]}
    origin = {**source.origin, "assembled": parts.facts()}
    model = replace(fits, name=source.model.name, lm=source.model.lm)
    return replace(source, model=model, weights={**source.weights, "merger": kept}, origin=origin)


def published_config(parts: Parts, options: Options) -> dict[str, Any]:
    """The config.json that the original's training would write for these parts.

    Towers are named by absolute paths. Raises ConfigError for a system or tower that is not ours.
    """
    if parts.system not in TOWERS:
        raise ConfigError(
            f"no model of system {parts.system!r} can be put together",
            hint=f"known: {', '.join(TOWERS)}",
        )
    _check_towers(parts, options)
    if parts.system == "comm":
        return _comm_config(parts, options)
    return _llava_config(parts, options)


def _check_towers(parts: Parts, options: Options) -> None:
    """Raise ConfigError unless the towers are of the kinds that the system takes."""
    known, given = TOWERS[parts.system], sorted(parts.towers)
    fits = given == sorted(known) if parts.system == "comm" else len(given) == 1
    if not fits or not set(given) <= set(known):
        takes = (
            "both of clip and dinov2" if parts.system == "comm" else f"one of {' or '.join(known)}"
        )
        raise ConfigError(
            f"a model of system {parts.system} takes {takes} as towers; given: "
            f"{', '.join(given) or 'none'}",
            hint="a tower is given by its kind and its folder",
        )
    for name, folder in parts.towers.items():
        if not (folder / "config.json").exists():
            raise ConfigError(
                f"{folder} is no folder of a vision tower: it has no config.json",
                hint="a tower is a Hugging Face folder with weights and preprocessor_config.json",
            )
        path = folder / "config.json"
        kind, _ = read_encoder(read_json(path), str(path), options)
        if kind != name:
            raise ConfigError(f"{folder} holds a tower of kind {kind}, not {name}")


def _llava_config(parts: Parts, options: Options) -> dict[str, Any]:
    lm = read_json(parts.lm_folder / "config.json")
    kind = language_models.MODEL_TYPES.get(str(lm.get("model_type")))
    if kind is None or "mm_vision_tower" in lm:
        raise ConfigError(
            f"{parts.lm_folder} (model_type {lm.get('model_type')!r}) is no language model that "
            "edgevlm implements",
            hint=f"implemented: {', '.join(language_models.MODEL_TYPES)}",
        )
    row = language_models.row(kind)
    ((encoder, folder),) = parts.towers.items()
    config = {
        **lm,
        "architectures": [row.llava_classes[0]],
        "model_type": row.llava_types[0],
        "mm_vision_tower": str(folder.resolve()),
        "mm_hidden_size": _channels(encoder, folder, options),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tokenizer_padding_side": "right",
        **_OF_SYSTEM[parts.system],
    }
    overrides = dict(parts.overrides or {})
    if parts.system == "convllava":
        overrides.pop("image_size", None)  # of the tower, not of this file
    config |= overrides
    if str(config["image_aspect_ratio"]).startswith("anyres"):
        config.setdefault("image_grid_pinpoints", _pinpoints(folder, options))
    if parts.system == "mlcd" and not original.names_mlcd(config):
        raise ConfigError(
            f"the tower's folder {folder} must have 'mlcd' in its name, by which the original "
            "chooses its class",
            hint="rename it, as in mlcd-vit-large-patch14-336",
        )
    return config


def _channels(encoder: str, folder: Path, options: Options) -> int:
    """mm_hidden_size: the channels of one hidden state of a tower."""
    path = folder / "config.json"
    _, reader = read_encoder(read_json(path), str(path), options)
    config = models.encoder(encoder).Config.read(reader, (-1,), False)
    return int(config.hidden_sizes[0])


def _pinpoints(folder: Path, options: Options) -> list[list[int]]:
    side = towers.read_rule(folder, options).size[0]
    return [[side * columns, side * rows] for columns, rows in _GRIDS]


def _comm_config(parts: Parts, options: Options) -> dict[str, Any]:
    """COMM's own config.json; <im_start> and <im_end> are used where the LM has rows for them."""
    rule = towers.read_rule(parts.towers["clip"], options)
    return {
        "model_type": "edgevlm_comm",
        "clip": str(parts.towers["clip"].resolve()),
        "dinov2": str(parts.towers["dinov2"].resolve()),
        "language_model": str(parts.lm_folder.resolve()),
        "image_size": rule.size[0],
        "use_im_start_end": _has_image_marks(parts.lm_folder),
        **(parts.overrides or {}),
    }


def _has_image_marks(folder: Path) -> bool:
    """Whether the tokenizer's files know both tokens that may surround an image."""
    known: set[str] = set()
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        if (folder / name).exists():
            text = (folder / name).read_text(encoding="utf-8")
            known |= {token for token in ("<im_start>", "<im_end>") if json.dumps(token) in text}
    return len(known) == 2
