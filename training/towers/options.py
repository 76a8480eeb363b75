"""Options of `edgevlm train` that stages of vision towers have beside the shared ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from edgevlm.toolkit.errors import ConfigError
from edgevlm.training import options
from edgevlm.training.options import TrainOptions
from edgevlm.training.towers.stages import TowerStage

# Shared options that mean nothing for a tower, or are not implemented for one.
_NOT_FOR_TOWERS = (
    "max_length", "template", "views", "train", "freeze", "compile", "lora", "lora_alpha",
    "lora_dropout", "lora_on", "qat", "dtype",
)  # fmt: skip


@dataclass(frozen=True)
class TowerOptions:
    """Each option with its help; None is what the stage says."""

    labels: Annotated[str | None, "Label file (.npy) with the classes of each image."] = None
    eval_labels: Annotated[str | None, "The same for the held-out images."] = None
    classes: Annotated[int | None, "Cluster the images into so many classes first."] = None
    positives: Annotated[int | None, "Classes that an image belongs to."] = None
    sample_rate: Annotated[float | None, "Share of the classes that a step compares with."] = None
    channels: Annotated[int | None, "Channels of embeddings that a step uses."] = None
    margin: Annotated[float | None, "Added to the angle of right classes, in radians."] = None
    scale: Annotated[float | None, "Of the cosines, before the loss."] = None
    class_rate: Annotated[float | None, "Learning rate of the classes over the tower's."] = None
    drop_path: Annotated[float | None, "Rate of stochastic depth in the last block."] = None

    def __post_init__(self) -> None:
        names = ("classes", "positives", "channels", "scale", "class_rate")
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{flag(name)} {value} is not above 0")
        for name in ("sample_rate", "drop_path", "margin"):
            value = getattr(self, name)
            most = 3.15 if name == "margin" else 1
            if value is not None and not 0 <= value <= most:
                raise ConfigError(f"{flag(name)} {value} is not between 0 and {most}")
        if self.labels is not None and self.classes is not None:
            raise ConfigError(
                "--labels and --classes contradict one another",
                hint="--classes makes labels by clustering, --labels takes those of a file",
            )


def flag(name: str) -> str:
    """The flag of an option."""
    return "--" + name.replace("_", "-")


def split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options by name: the others, and those of TowerOptions."""
    names = {field.name for field in fields(TowerOptions)}
    own = {key: value for key, value in values.items() if key in names}
    return {key: value for key, value in values.items() if key not in names}, own


def refuse_for_vlm(own: TowerOptions, stage: str) -> None:
    """Raise ConfigError if an option of towers is given for a stage of a whole model."""
    for field in fields(own):
        if getattr(own, field.name) != field.default:
            raise ConfigError(
                f"{flag(field.name)} is for stages of vision towers, {stage} trains a whole model",
                hint="edgevlm train list",
            )


def refuse_for_tower(shared: TrainOptions, stage: str) -> None:
    """Raise ConfigError if an option is given that a tower's training does not have."""
    plain = TrainOptions()
    for name in _NOT_FOR_TOWERS:
        if getattr(shared, name) != getattr(plain, name):
            raise ConfigError(f"{flag(name)} is not for {stage}, which trains a vision tower alone")
    if shared.precision == "fp16":
        raise ConfigError(
            f"--precision fp16 is not implemented for {stage}", hint="--precision bf16"
        )


def read(config: str | Path | None, flags: Mapping[str, Any]) -> tuple[TrainOptions, TowerOptions]:
    """The options of a run from a file and from flags, which win; those of towers by themselves.

    Raises ConfigError.
    """
    file = options.from_file(Path(config)) if config is not None else {}
    where = str(config or "training options")
    (shared, own), (shared_file, own_file) = split(flags), split(file)
    return (
        options.combine(TrainOptions, shared, shared_file, where),
        options.combine(TowerOptions, own, own_file, where),
    )


def refuse_flags(flags: Mapping[str, Any], stage: str) -> None:
    """Raise ConfigError if a flag has a value that is for whole models."""
    given = [flag for flag, value in flags.items() if value]
    if given:
        raise ConfigError(
            f"{given[0]} is not for {stage}, which trains a vision tower alone",
            hint="--model takes a tower's folder, a .pt of UNICOM, or random:KIND=config.json",
        )


def applied(stage: TowerStage, shared: TrainOptions, own: TowerOptions) -> TowerStage:
    """The stage with what the options replace."""
    given = {
        "learning_rate": shared.rate,
        "global_batch": shared.batch,
        "epochs": shared.epochs,
        "warmup_share": shared.warmup,
        "weight_decay": shared.weight_decay,
        "schedule": shared.schedule,
        "labels": own.positives,
        "sample_rate": own.sample_rate,
        "num_channels": own.channels,
        "margin": own.margin,
        "scale": own.scale,
        "head_factor": own.class_rate,
        "drop_path": own.drop_path,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if stage.loss == "partial_fc" and changes.get("labels", 1) != 1:
        raise ConfigError(f"{stage.name} takes one class an image (--positives 1)")
    return replace(stage, **changes)
