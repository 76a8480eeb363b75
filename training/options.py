"""What a training run is asked to do: one value, made from flags or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.strict import from_plain

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class TrainOptions:
    """The options of `edgevlm train`; None is what the stage says.

    batch: samples of an optimizer step over all processes; micro_batch: those of one forward pass
    of one process, the rest is accumulated. steps: of the optimizer, instead of epochs. train:
    GLOB or GLOB=RATE, freeze: GLOB, both after the stage's own rules. max_broken: share of the data
    that may be broken. ema: decay of the averaged weights, 0 for none. lora: rank of the adapters,
    0 for none. save_every: steps between states to resume from; the last two are kept.
    """

    data: tuple[str, ...] = ()
    images: str | None = None
    eval_data: tuple[str, ...] = ()
    batch: int | None = None
    micro_batch: int | None = None
    epochs: float | None = None
    steps: int | None = None
    rate: float | None = None
    schedule: Schedule = "cosine"
    warmup: float | None = None
    weight_decay: float | None = None
    clip: float = 1.0
    max_length: int | None = None
    template: str | None = None
    views: Literal["model", "square", "pad"] | None = None
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    recompute: bool = False
    compile: bool = False
    lora: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_on: str = "lm.*"
    qat: str | None = None
    ema: float = 0.0
    seed: int = 0
    workers: int = 0
    log_every: int = 10
    save_every: int = 200
    eval_every: int = 0
    tensorboard: bool = False
    max_broken: float = 0.01

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


def combine(flags: Mapping[str, Any], file: Mapping[str, Any], where: str) -> TrainOptions:
    """Options from a file, of which the flags that were given replace some.

    Raises ConfigError for a key that is no option, naming it.
    """
    known = {field.name for field in fields(TrainOptions)}
    unknown = sorted(set(file) - known)
    if unknown:
        raise ConfigError(
            f"{where}: {', '.join(unknown)} is no option of training",
            hint="edgevlm train --help lists them",
        )
    listed = ("data", "eval_data", "train", "freeze")
    plain = {k: [v] if k in listed and isinstance(v, str) else _number(k, v) for k, v in file.items()}
    given = {key: list(v) if isinstance(v, tuple) else v for key, v in flags.items()}
    options: TrainOptions = from_plain(TrainOptions, plain | given, where)
    return options


def _number(key: str, value: Any) -> Any:
    """YAML takes 2e-5 for a text: only 2.0e-5 is a number there."""
    if key not in ("rate", "weight_decay", "max_broken", "ema", "warmup", "clip", "epochs"):
        return value
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
