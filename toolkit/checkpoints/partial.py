"""Folders that hold a part of a checkpoint: a LoRA adapter, or a projector alone.

With the folder of the base model their tensors are joined as the originals' loader does
(haotian-liu/LLaVA, llava/model/builder.py); without it they are named for what they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgevlm.toolkit.checkpoints.weights import (
    Checkpoint,
    TensorSource,
    TorchReader,
    has_weights,
    open_checkpoint,
    open_file,
)
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.strict import Reader, read_json

ADAPTER = "adapter_config.json"
_PREFIX = "base_model.model."  # what PEFT puts before the names of the model that it wraps


def kind_of(folder: Path) -> str | None:
    """What a folder without a language model's weights holds; None if it is none of these."""
    if has_weights(folder) or not folder.is_dir():
        return None
    if (folder / ADAPTER).exists():
        return "adapter"
    return "projector" if _find(folder, "mm_projector") else None


def refuse_alone(folder: Path) -> None:
    """Raise CheckpointError if `folder` needs a base model, naming the one that it states."""
    kind = kind_of(folder)
    if kind == "adapter":
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise _alone(folder, "a LoRA adapter", "base model", base, ADAPTER)
    if kind == "projector":
        path = folder / "config.json"
        base = read_json(path).get("_name_or_path") if path.exists() else None
        raise _alone(folder, "a projector (mm_projector)", "language model", base, path.name)


def _alone(folder: Path, part: str, missing: str, base: object, file: str) -> CheckpointError:
    """The error for a folder that holds `part` alone; base: the model that `file` names."""
    named = isinstance(base, str) and bool(base.strip())
    command = f"edgevlm export {folder} OUT --base BASE, with"
    return CheckpointError(
        f"{folder} holds {part} without its {missing} "
        + (f"({base!r})" if named else f"(which {file} does not name)"),
        hint=f"{command} the folder or the model id of that model"
        if named
        else f"{command} the folder or the model id of the model that it was trained on",
    )


def open_joined(folder: Path, base: Path | None, torch_reader: TorchReader | None) -> Checkpoint:
    """The weights of `folder`, completed by those of the folder `base` if it is given.

    Raises CheckpointError if the folder needs no base, or does not fit it.
    """
    if base is None:
        return open_checkpoint(folder, torch_reader)
    kind = kind_of(folder)
    if kind is None:
        raise CheckpointError(
            f"{folder} has a language model of its own or no part of one; --base is for a LoRA "
            "adapter or a projector alone",
            hint="leave --base out",
        )
    whole = open_checkpoint(base, torch_reader)
    sources: dict[str, TensorSource] = dict.fromkeys(whole.keys(), whole)
    for stem in ("non_lora_trainables", "mm_projector"):
        file = _find(folder, stem)
        if file is not None:
            sources |= _renamed(open_file(file, torch_reader))
    if kind == "adapter":
        sources |= _merged(folder, sources, torch_reader)
    return Checkpoint(sources, f"{folder} on {base}")


def _find(folder: Path, stem: str) -> Path | None:
    paths = (folder / f"{stem}.safetensors", folder / f"{stem}.bin")
    return next((path for path in paths if path.exists()), None)


@dataclass(frozen=True)
class _Renamed:
    """The tensors of a file under other names."""

    inner: TensorSource
    stored: Mapping[str, str]

    def keys(self) -> Iterable[str]:
        return self.stored

    def shape(self, key: str) -> tuple[int, ...]:
        return self.inner.shape(self.stored[key])

    def read(self, key: str) -> Array:
        return self.inner.read(self.stored[key])


def _renamed(file: TensorSource) -> dict[str, TensorSource]:
    """The tensors of a file that training saved, under the names of a whole checkpoint."""
    stored = {}
    for key in file.keys():  # noqa: SIM118 (a source is no mapping)
        name = key.removeprefix(_PREFIX)
        if "mm_projector." in name:  # the originals cut the name there too
            name = f"model.mm_projector.{name.split('mm_projector.', 1)[1]}"
        stored[name] = key
    renamed = _Renamed(file, stored)
    return dict.fromkeys(stored, renamed)


# -- LoRA (Hu et al., arXiv 2106.09685) ------------------------------------------------------------


@dataclass(frozen=True)
class _Merged:
    """A weight of the base with its adapter: W + scale * B @ A, in float32."""

    base: TensorSource
    adapter: TensorSource
    a: str
    b: str
    scale: float

    def keys(self) -> Iterable[str]:
        return ()  # it stands under the key of the base's tensor

    def shape(self, key: str) -> tuple[int, ...]:
        return self.base.shape(key)

    def read(self, key: str) -> Array:
        weight = self.base.read(key)
        if weight.dtype.kind != "f":
            return weight  # refused by whoever reads it
        a, b = (self.adapter.read(name).astype(np.float32) for name in (self.a, self.b))
        return np.asarray(weight.astype(np.float32) + np.float32(self.scale) * (b @ a))


def _merged(
    folder: Path, sources: Mapping[str, TensorSource], torch_reader: TorchReader | None
) -> dict[str, TensorSource]:
    """The base's weights that the adapter changes."""
    scale = _read_scale(folder)
    path = _find(folder, "adapter_model")
    if path is None:
        raise CheckpointError(
            f"{folder} has {ADAPTER} and no adapter_model.safetensors or .bin",
            hint="the download or copy is incomplete; fetch the adapter again",
        )
    file = open_file(path, torch_reader)
    keys = set(file.keys())
    found: dict[str, TensorSource] = {}
    for a in sorted(keys):
        b = a.replace(".lora_A.", ".lora_B.")
        module = a.removeprefix(_PREFIX).partition(".lora_")[0]
        target = _target(module, sources)
        if not {a, b, a.replace(".lora_B.", ".lora_A.")} <= keys or ".lora_" not in a:
            raise CheckpointError(
                f"{path}: {a} is no pair of lora_A and lora_B",
                hint="merge it with the program that trained it, then export the merged folder",
            )
        if target is None:
            raise CheckpointError(
                f"{path}: {a} changes {module}, which the base model does not have",
                hint=f"--base is another model than the adapter's; {ADAPTER} names its own",
            )
        if ".lora_A." in a:
            merged = _Merged(sources[target], file, a, b, scale)
            _check_shapes(merged, target, path)
            found[target] = merged
    return found


def _target(module: str, sources: Mapping[str, TensorSource]) -> str | None:
    """The stored weight of a module; names changed between transformers 4 and 5."""
    older = module.replace("model.language_model.", "language_model.model.", 1)
    newer = module.replace("language_model.model.", "model.language_model.", 1)
    names = (f"{name}.weight" for name in (module, older, newer))
    return next((name for name in names if name in sources), None)


def _check_shapes(merged: _Merged, target: str, path: Path) -> None:
    (outputs, rank), (rank_a, inputs) = (merged.adapter.shape(n) for n in (merged.b, merged.a))
    if (outputs, inputs) != merged.shape(target) or rank != rank_a:
        raise CheckpointError(
            f"{path}: lora_B is {(outputs, rank)} and lora_A {(rank_a, inputs)}, {target} of the "
            f"base is {merged.shape(target)}",
            hint=f"--base is another model than the adapter's; {ADAPTER} names its own",
        )


def _read_scale(folder: Path) -> float:
    """The factor of B @ A. Raises ConfigError for adapters that are more than W + scale * B @ A."""
    path = folder / ADAPTER
    r = Reader(read_json(path), str(path))
    r.ignore("lora")
    r.choice("peft_type", ["LORA"])
    r.choice("bias", ["none"], "none")
    r.choice("init_lora_weights", [True, False, "gaussian"], True)  # others change the base too
    for switch in ("fan_in_fan_out", "use_dora", "lora_bias", "use_qalora"):
        r.choice(switch, [False], False)
    for key in ("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication",
                "trainable_token_indices", "target_parameters"):  # fmt: skip
        if r.raw(key):
            raise ConfigError(
                f"{path}: {key} = {str(r.raw(key))[:80]} is not implemented",
                hint="merge it with the program that trained it, then export the merged folder",
            )
    rank, alpha = r.count("r"), r.take("lora_alpha", float)
    rooted = r.take("use_rslora", bool, False)
    r.done()
    return alpha / (math.sqrt(rank) if rooted else rank)
