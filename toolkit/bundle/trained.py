"""The checkpoint that training writes and export reads: our tensors under our own names.

checkpoint.json   model configuration, where it came from, files with size and sha256
model.safetensors   COMPONENT.KEY, such as lm.embed.weight; or shards with an index
tokenizer.json
Other files beside these (training.json, states/, ...) are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit.bundle import sealed, unfinished
from edgevlm.toolkit.bundle.atomic import require_space, sha256_of, writing
from edgevlm.toolkit.bundle.manifest import (
    DTYPES,
    MANIFEST,
    TOKENIZER,
    Bundle,
    FileRecord,
    check_names,
    record_file,
    size_fault,
)
from edgevlm.toolkit.bundle.publish import move_files
from edgevlm.toolkit.checkpoints import shards
from edgevlm.toolkit.checkpoints.layouts.source import (
    ComponentTensors,
    Options,
    Source,
    check,
    with_context,
)
from edgevlm.toolkit.checkpoints.safetensors_io import TensorSpec, row_blocks
from edgevlm.toolkit.checkpoints.weights import open_checkpoint
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.models.recipes import keep
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.strict import from_plain, read_json, read_text
from edgevlm.toolkit.vlm import config as model_config
from edgevlm.toolkit.vlm.components import Component, components
from edgevlm.toolkit.vlm.config import ModelConfig

FORMAT = 1
CHECKPOINT = "checkpoint.json"
LAYOUT = "edgevlm"  # in the origin of a model that was read from this format
_DAMAGED = "the folder was changed or copied in part; save the checkpoint again"

Tensors = Mapping[str, Mapping[str, Array]]


@dataclass(frozen=True)
class Description:
    """What checkpoint.json holds.

    origin: where the model came from before training. training: facts about the run (stage,
    steps, ...); both are for people and for reports, and no number depends on them.
    """

    format: int
    made_by: str
    dtype: str
    model: Mapping[str, Any]
    origin: Mapping[str, Any]
    training: Mapping[str, Any]
    files: Mapping[str, FileRecord]


def write(
    folder: Path,
    source_model: ModelConfig,
    tokenizer: str,
    tensors: Tensors,
    *,
    dtype: str = "fp32",
    origin: Mapping[str, Any],
    training: Mapping[str, Any],
    made_by: str,
    force: bool = False,
) -> None:
    """Write a checkpoint as the new folder `folder`, whole or not at all.

    tokenizer: the text of tokenizer.json. tensors: for each component with weights its tensors;
    one is asked for at a time. dtype: fp32, bf16 or fp16. origin, training: JSON objects.
    Raises OutputError if the folder exists (unless `force`, and only for our own) or cannot be
    written, CheckpointError for tensors that are missing, have another shape or do not fit dtype.
    """
    require_space(folder, _size(source_model, dtype))
    with writing(folder, force=force) as partial:
        _fill(partial, source_model, tokenizer, tensors, dtype, origin, training, made_by)


def write_into(
    folder: Path,
    source_model: ModelConfig,
    tokenizer: str,
    tensors: Tensors,
    *,
    dtype: str = "fp32",
    origin: Mapping[str, Any],
    training: Mapping[str, Any],
    made_by: str,
) -> None:
    """Write a checkpoint beside the other files of an existing folder, in place of an older one.

    All files are written under a temporary name first. checkpoint.json goes into place last, so
    the folder is never read half-written; what a kill interrupts before, the next call puts back.
    One writer at a time.
    """
    require_space(folder, _size(source_model, dtype))
    unfinished.recover(folder)
    with unfinished.held(folder, inside=True) as made:
        made.folder.mkdir()
        _fill(made.folder, source_model, tokenizer, tensors, dtype, origin, training, made_by)
        move_files(made, _older(folder))


def _older(folder: Path) -> list[str]:
    """The files of the checkpoint that a folder holds; of a damaged one its description alone."""
    if not (folder / CHECKPOINT).exists():
        return []
    try:
        listed = read_description(folder).files
    except CheckpointError:
        return [CHECKPOINT]
    return [CHECKPOINT, *(name for name in listed if (folder / name).exists())]


def _fill(
    folder: Path,
    model: ModelConfig,
    tokenizer: str,
    tensors: Tensors,
    dtype: str,
    origin: Mapping[str, Any],
    training: Mapping[str, Any],
    made_by: str,
) -> None:
    """Write all files of a checkpoint into an empty folder."""
    places = {
        f"{c.name}.{key}": (c.name, key, shape)
        for c in components(model)
        for key, shape in c.shapes.items()
    }
    _check_complete(model, tensors)
    specs = [TensorSpec(name, dtype, shape) for name, (*_, shape) in places.items()]

    def produce(spec: TensorSpec) -> Iterator[Array]:
        component, key, _ = places[spec.name]
        yield from row_blocks(tensors[component][key])

    written = shards.write(folder, shards.split(specs), produce)
    files = {name: FileRecord(file.nbytes, file.sha256) for name, file in written.items()}
    (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
    for name in (TOKENIZER, shards.INDEX):
        if (folder / name).exists():
            files[name] = record_file(folder / name)
    description = Description(
        FORMAT, made_by, dtype, model_config.to_json(model), origin, training, files
    )
    sealed.write(folder / CHECKPOINT, description)


def _weighted(model: ModelConfig) -> list[Component]:
    return [component for component in components(model) if component.shapes]


def _size(model: ModelConfig, dtype: str) -> int:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}, expected one of {DTYPES}")
    shapes = [shape for c in _weighted(model) for shape in c.shapes.values()]
    return sum(shards.nbytes_of(TensorSpec("", dtype, shape)) for shape in shapes)


def _check_complete(model: ModelConfig, tensors: Tensors) -> None:
    """Raise CheckpointError unless `tensors` are those of the model, by name."""
    expected = {f"{c.name}.{key}" for c in _weighted(model) for key in c.shapes}
    given = {f"{name}.{key}" for name, group in tensors.items() for key in group}
    for kind, names in (("lacks", expected - given), ("does not know", given - expected)):
        if names:
            raise CheckpointError(f"the model {kind} {', '.join(sorted(names)[:3])}")


# -- reading -----------------------------------------------------------------------------------


def is_trained(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of this format."""
    return (folder / CHECKPOINT).exists()


def read_description(folder: Path) -> Description:
    """checkpoint.json. Raises CheckpointError if it is damaged, or of another format."""
    file = folder / CHECKPOINT
    try:
        data = read_json(file, ours=True)
        if data.get("format") != FORMAT:
            raise CheckpointError(
                f"{file} has format {data.get('format')!r:.80}, this version reads {FORMAT}",
                hint="save the checkpoint again with this version",
            )
        stated = {key: value for key, value in data.items() if key != sealed.SEAL}
        description = from_plain(Description, stated, str(file))
        sealed.opened(data, str(file), required=False)  # older ones have none
        check_names(str(file), description.files)
    except ConfigError as odd:
        raise CheckpointError(odd.message, hint=_DAMAGED) from None
    if TOKENIZER not in description.files:
        raise CheckpointError(f"{file}: files lacks {TOKENIZER}", hint=_DAMAGED)
    return description


def verify(folder: Path) -> Description:
    """What a checkpoint says of itself. Raises CheckpointError if a file is not what was written;
    reads everything.
    """
    description = read_description(folder)
    _check_sizes(folder, description)
    for name, record in description.files.items():
        if sha256_of(folder / name) != record.sha256:
            raise CheckpointError(
                f"{folder / name} was changed after it was written (its checksum differs)",
                hint=_DAMAGED,
            )
    return description


def verified(folder: Path) -> Path:
    """The folder itself. Raises BundleError or CheckpointError if it is a bundle or checkpoint of
    ours and damaged: it is about to be read as a whole anyway.
    """
    if (folder / MANIFEST).exists():
        Bundle.open(folder).verify()
    elif is_trained(folder):
        verify(folder)
    return folder


def load(folder: Path, options: Options) -> Source:
    """The model of a checkpoint, its weights read when they are used.

    Raises CheckpointError for a missing or cut file and for tensors that are missing, unexpected
    or of another shape, naming them; ConfigError for options of published checkpoints.
    """
    description = read_description(folder)
    _check_sizes(folder, description)
    try:
        model = model_config.from_json(dict(description.model), f"{folder / CHECKPOINT}: model")
        declared = _weighted(model)
    except ConfigError as odd:
        raise CheckpointError(odd.message, hint=_DAMAGED) from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as odd:
        raise CheckpointError(
            f"{folder / CHECKPOINT}: there is no model of this configuration ({odd})", hint=_DAMAGED
        ) from None
    _check_options(folder, model, options)
    stored = open_checkpoint(folder)
    tensors = {
        c.name: ComponentTensors(
            {key: keep(f"{c.name}.{key}") for key in c.shapes}, c.shapes, stored
        )
        for c in declared
    }
    check(tensors.values(), ())
    model = replace(model, lm=with_context(model.lm, options.max_context))
    text = read_text(folder / TOKENIZER)
    weights = {name: group.weights() for name, group in tensors.items()}
    return Source(model, weights, text, _origin(description))


def _origin(description: Description) -> dict[str, Any]:
    """What the manifest of an export says about where its weights came from.

    Of stages that follow one another, earlier holds the facts about those before the last.
    """
    before = dict(description.origin)
    layout, facts = before.pop("layout", None), before.pop("training", None)
    if layout not in (None, LAYOUT):
        before["trained_from"] = layout
    if layout == LAYOUT and facts:
        before["earlier"] = [*before.get("earlier", ()), facts]
    return {
        **before,
        "layout": LAYOUT,
        "dtype": description.dtype,
        "training": dict(description.training),
    }


def _check_sizes(folder: Path, description: Description) -> None:
    for name, record in description.files.items():
        fault = size_fault(folder, name, record, CHECKPOINT)
        if fault:
            raise CheckpointError(fault, hint=_DAMAGED)


def _check_options(folder: Path, model: ModelConfig, options: Options) -> None:
    """Raise ConfigError for options that mean nothing for a checkpoint of this format."""
    if options.system not in (None, model.system):
        raise ConfigError(
            f"{folder} is a trained checkpoint of system {model.system}, not {options.system}",
            hint="leave --system out",
        )
    foreign = {
        "--base": options.base,
        "--vision-tower": options.vision_tower,
        "--ignore-key": options.ignore_keys,
    }
    chosen = [option for option, value in foreign.items() if value]
    if chosen:
        raise ConfigError(
            f"{folder} is a trained checkpoint and holds the whole model; {', '.join(chosen)} is "
            "for published checkpoints",
            hint="leave it out",
        )
