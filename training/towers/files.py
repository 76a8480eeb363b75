"""Towers on disk, in the names of the published files: read to go on, written for others to use."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from edgevlm.toolkit import models
from edgevlm.toolkit.bundle.atomic import writing
from edgevlm.toolkit.checkpoints.layouts import native_mlcd, unicom_file
from edgevlm.toolkit.checkpoints.layouts.source import find_prefix
from edgevlm.toolkit.checkpoints.weights import Checkpoint, Recipes, check_tables
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.models.encoders import mlcd, unicom
from edgevlm.toolkit.models.recipes import Recipe, transposed
from edgevlm.training.towers.tower import Tower, tokens_only

# What a whole CLIP holds besides its vision tower.
_BESIDE = (
    "*position_ids", "text_model.*", "text_projection.*", "visual_projection.*", "logit_scale",
)  # fmt: skip
FILES = ("model.safetensors", "preprocessor_config.json", "config.json")
PREFIXES = ("", "vision_model.", "model.", "_orig_mod.", "module.")


def read_tower(tower: Tower, checkpoint: Checkpoint) -> None:
    """Fill a tower from a published file or from what `save_tower` wrote, in float32.

    Accepts the prefixes that training programs leave, and a whole CLIP with its text model. Raises
    CheckpointError for tensors that are missing, unexpected or of another shape.
    """
    table = dict(_names(tower))
    native = native_mlcd.prefix_in(checkpoint) if tower.kind == "mlcd" else None
    known = unicom_file.prefix_in(checkpoint) if tower.kind == "unicom" else native
    if native is not None:
        table = dict(mlcd.native_embed_names(tower.config))
    prefix = find_prefix(table, checkpoint, *PREFIXES) if known is None else known
    table = {name: recipe.below(prefix) for name, recipe in table.items()}
    unused = _unused(tower.kind, prefix, native=native is not None)
    check_tables([(table, tower.shapes())], checkpoint, unused)
    state = {name: np.asarray(x, np.float32) for name, x in Recipes(table, checkpoint).items()}
    if tower.kind == "unicom":
        for name in tower.feature.state_dict(prefix="feature."):
            if prefix + name not in checkpoint:
                raise CheckpointError(f"{checkpoint.where} has no tensor called {prefix}{name}")
            state[name] = checkpoint.read(prefix + name)
    own = tower.state_dict()
    for name, array in state.items():
        if array.shape != tuple(own[name].shape):
            shapes = f"{list(array.shape)}, expected {list(own[name].shape)}"
            raise CheckpointError(f"{checkpoint.where}: {name} is {shapes}")
    # ascontiguousarray makes a scalar (the batch counter) a vector
    tensors = {k: torch.from_numpy(np.array(v, order="C")) for k, v in state.items()}
    tower.load_state_dict(tensors)


def _unused(kind: str, prefix: str, *, native: bool) -> Sequence[str]:
    """Globs of tensors that a tower's file may hold and that are not read."""
    if native:
        return [prefix + name for name in native_mlcd.UNUSED]
    return [f"{prefix}feature.*"] if kind == "unicom" else _BESIDE


def published(tower: Tower) -> dict[str, Tensor]:
    """The tower's tensors under the names, and in the shapes, of the published file.

    For UNICOM with the batch norms as they are: `torch.save` of it is a file of the original.
    """
    own = {name: tensor.detach() for name, tensor in tower.state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, recipe in _names(tower).items():
        (source,) = recipe.sources
        if source.endswith("attn.qkv.weight"):  # UNICOM joins the three
            block = name.rsplit(".", 2)[0]
            found[source] = torch.cat([own[f"{block}.{part}.weight"].T for part in "qkv"])
        elif name == "class_angle" or source == "pos_embed":
            found[source] = own[name][None]
        else:
            found[source] = own[name].T if recipe.make is transposed else own[name]
    return found | {name: x for name, x in own.items() if name.startswith("feature.")}


def save_tower(tower: Tower, out: Path) -> None:
    """Write a folder with config.json and model.safetensors, whole or not at all.

    CLIP and MLCD become folders of transformers' CLIPVisionModel and MLCDVisionModel with their
    preprocessing. UNICOM has no such layout: the tensors have the names of its .pt file, and
    config.json our fields. Raises OutputError if `out` exists, ConfigError for what those
    configurations cannot state: images that are not square, another base of rotary angles.
    """
    config = published_config(tower)
    with writing(out, force=False) as folder:
        _fill(tower, config, folder)


def save_tower_into(tower: Tower, out: Path) -> None:
    """The same beside the other files of an existing folder; config.json comes last.

    Each file is written under another name first. Raises ConfigError as `save_tower` does.
    """
    config = published_config(tower)
    partial = out / ".tower.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _fill(tower, config, partial)
    for name in FILES:
        os.replace(partial / name, out / name)
    partial.rmdir()


def _fill(tower: Tower, config: Mapping[str, Any], folder: Path) -> None:
    prefix = "" if tower.kind == "unicom" else "vision_model."
    tensors = {prefix + k: v.contiguous().cpu() for k, v in published(tower).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor = json.dumps(_processor(tower.config.pixels[0]), indent=2)
    (folder / "preprocessor_config.json").write_text(processor + "\n")


def _names(tower: Tower) -> Mapping[str, Recipe]:
    if tower.kind == "unicom":
        return unicom.names(tokens_only(tower.config))
    file: Any = models.encoder(tower.kind)
    table: Mapping[str, Recipe] = file.embed_names(tower.config)
    return table


def published_config(tower: Tower) -> dict[str, Any]:
    """The config.json of a saved tower. Raises ConfigError for what it cannot state."""
    c = tower.config
    if c.pixels[0] != c.pixels[1]:
        raise ConfigError(f"the images are {c.pixels}, config.json states square ones only")
    if getattr(c, "theta", 10000.0) != 10000.0:
        raise ConfigError(f"theta is {c.theta}, transformers' MLCD has 10000")
    if tower.kind == "unicom":
        return {"model_type": "unicom", **asdict(c)}
    classes = {"clip": "CLIPVisionModel", "mlcd": "MLCDVisionModel"}
    return {
        "architectures": [classes[tower.kind]],
        "model_type": {"clip": "clip_vision_model", "mlcd": "mlcd_vision_model"}[tower.kind],
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "patch_size": c.patch_size,
        "image_size": c.pixels[0],
        "hidden_act": c.activation,
        "layer_norm_eps": c.eps,
    }


def _processor(side: int) -> dict[str, Any]:
    """A preprocessor_config.json of CLIPImageProcessor."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
