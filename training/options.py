"""What a training run is asked to do: one value, made from flags or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.strict import from_plain

Schedule = Literal["cosine", "linear", "constant", "one_cycle"]
Precision = Literal["fp32", "bf16", "fp16"]
Options = TypeVar("Options")


@dataclass(frozen=True)
class TrainOptions:
    """The options of `edgevlm train`, each with its help; None is what the stage says."""

    data: Annotated[tuple[str, ...], "A data set, see docs/training.md. Repeatable."] = ()
    images: Annotated[str | None, "Where relative image paths begin; default: beside the data."] = (
        None
    )
    eval_data: Annotated[tuple[str, ...], "Held-out data. Repeatable."] = ()
    batch: Annotated[int | None, "Samples of an optimizer step, over all processes."] = None
    micro_batch: Annotated[int | None, "Samples of one forward pass; the rest is accumulated."] = (
        None
    )
    epochs: Annotated[float | None, "Passes over the data."] = None
    steps: Annotated[int | None, "Optimizer steps, instead of epochs."] = None
    rate: Annotated[float | None, "Learning rate; parts with a rate of their own keep it."] = None
    schedule: Annotated[Schedule | None, "cosine, linear, constant or one_cycle."] = None
    warmup: Annotated[float | None, "Share of the steps in which the rate rises."] = None
    weight_decay: Annotated[float | None, "Of matrices and kernels."] = None
    clip: Annotated[float, "Largest norm of the gradient."] = 1.0
    max_length: Annotated[int | None, "Positions of a sample; what is beyond is cut."] = None
    template: Annotated[str | None, "plain, auto (the model's own) or a name."] = None
    views: Annotated[Literal["model", "square", "pad"] | None, "How images are shown."] = None
    train: Annotated[tuple[str, ...], "GLOB or GLOB=RATE: train these too. Repeatable."] = ()
    freeze: Annotated[tuple[str, ...], "GLOB: freeze these. Repeatable."] = ()
    precision: Annotated[Precision, "Of computing: fp32, bf16 or fp16."] = "fp32"
    dtype: Annotated[Precision, "Of the checkpoint: fp32, bf16 or fp16."] = "fp32"
    recompute: Annotated[bool, "Gradient checkpointing: less memory, a third more time."] = False
    compile: Annotated[bool, "torch.compile every layer."] = False
    lora: Annotated[int, "Rank of low-rank adapters, merged at the end; 0 is none."] = 0
    lora_alpha: Annotated[float, "Scale of the adapters times their rank."] = 16.0
    lora_dropout: Annotated[float, "Of the adapters' inputs."] = 0.05
    lora_on: Annotated[str, "GLOB of the adapted matrices."] = "lm.*"
    sam: Annotated[str | None, "mlcd-seg: SAM's weight file, to begin with an MLCD model."] = None
    qat: Annotated[str | None, "int8, int4 or a plan's file: train with rounded weights."] = None
    ema: Annotated[float, "Decay of averaged weights, which are saved then; 0 is none."] = 0.0
    seed: Annotated[int, "Of the order of samples and of new weights."] = 0
    workers: Annotated[int, "Processes that read the data."] = 0
    log_every: Annotated[int, "Steps between lines of metrics."] = 10
    save_every: Annotated[int, "Steps between states to resume from; the last two are kept."] = 200
    eval_every: Annotated[int, "Steps between evaluations; 0: at the end only."] = 0
    tensorboard: Annotated[bool, "Write event files too."] = False
    max_broken: Annotated[float, "Share of the data that may be broken."] = 0.01

    def __post_init__(self) -> None:
        above = {
            name: getattr(self, name)
            for name in ("batch", "micro_batch", "epochs", "steps", "rate", "max_length", "clip")
        }
        above |= {"log_every": self.log_every, "save_every": self.save_every}
        for name, value in above.items():
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{_flag(name)} {value} is not above 0")
        shares = {
            "warmup": self.warmup,
            "max_broken": self.max_broken,
            "ema": self.ema,
            "lora_dropout": self.lora_dropout,
        }
        for name, value in shares.items():
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{_flag(name)} {value} is not between 0 and 1")
        for name in ("lora", "workers", "eval_every", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)} is negative")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("--steps and --epochs contradict one another", hint="leave one out")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def from_file(path: Path) -> dict[str, Any]:
    """The options in a YAML or JSON file; keys are the flags' names. Raises ConfigError."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as broken:
        reason = " ".join(str(broken).split())
        raise ConfigError(f"{path} is no YAML or JSON file: {reason}") from None
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} holds a {type(data).__name__}, expected options by name")
    return {str(key).replace("-", "_"): value for key, value in data.items()}


def combine(
    kind: type[Options], flags: Mapping[str, Any], file: Mapping[str, Any], where: str
) -> Options:
    """Options of a kind from a file, of which the flags that were given replace some.

    Raises ConfigError for a key that is no option, naming it.
    """
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(file) - known)
    if unknown:
        raise ConfigError(
            f"{where}: {', '.join(unknown)} is no option of training",
            hint="edgevlm train --help lists them",
        )
    listed = ("data", "eval_data", "train", "freeze")
    plain = {
        k: [v] if k in listed and isinstance(v, str) else _number(hints[k], v)
        for k, v in file.items()
    }
    given = {key: list(v) if isinstance(v, tuple) else v for key, v in flags.items()}
    options: Options = from_plain(kind, plain | given, where)
    return options


def _number(hint: Any, value: Any) -> Any:
    """YAML takes 2e-5 for a text: only 2.0e-5 is a number there."""
    if hint is not float and float not in get_args(hint):
        return value
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
