"""Which parameters are trained, at which rate, and how rates change over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from edgevlm.toolkit.errors import ConfigError
from edgevlm.training import lora
from edgevlm.training.options import Schedule, TrainOptions
from edgevlm.training.stages import Part, Stage, matches_something
from edgevlm.training.vlm import VLM


def applied(stage: Stage, options: TrainOptions) -> Stage:
    """The stage with what the options replace."""
    given = {
        "rate": options.rate,
        "batch": options.batch,
        "max_length": options.max_length,
        "warmup": options.warmup,
        "weight_decay": options.weight_decay,
        "epochs": options.epochs,
        "views": options.views,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    trained = [*stage.trained, *map(_part, options.train)]
    trained += [Part(glob, frozen=True) for glob in options.freeze]
    return replace(stage, trained=tuple(trained), **changes)


def _part(text: str) -> Part:
    """GLOB or GLOB=RATE."""
    glob, equals, number = text.partition("=")
    if not equals:
        return Part(glob)
    try:
        rate = float(number)
    except ValueError:
        rate = -1.0
    if not 0 < rate < math.inf:
        raise ConfigError(
            f"--train {text!r}: {number!r} is no learning rate", hint='such as "encoder.*=2e-6"'
        )
    return Part(glob, rate)


def freeze(model: VLM, stage: Stage, *, adapted: Sequence[str] = ()) -> None:
    """Let gradients reach what the stage trains and nothing else.

    adapted: matrices that are frozen because their adapters are trained; what else the stage
    trains in the language model (norms, embeddings) is frozen with them, as in the published
    scripts. Raises ConfigError if a rule matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    matches_something(stage, names)
    homes = {name.split(".", 1)[0] for name in adapted}
    for name, parameter in model.named_parameters():
        trained = stage.rate_of(name) is not None and name.split(".", 1)[0] not in homes
        parameter.requires_grad_(trained or lora.is_adapter(name))
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("nothing is left to train", hint="check --freeze and --train")


def groups(model: VLM, stage: Stage) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer: one for each rate, with and without weight decay.

    Decay is for matrices and kernels: not for biases, norms and scales.
    """
    found: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = stage.rate_of(name)
        decays = parameter.ndim > 1 and not fnmatchcase(name, "*norm*")
        found.setdefault((stage.rate if rate is None else rate, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rate,
            "base_rate": rate,
            "weight_decay": stage.weight_decay if decays else 0.0,
        }
        for (rate, decays), parameters in found.items()
    ]


def adamw(model: VLM, stage: Stage) -> torch.optim.AdamW:
    """AdamW as the published scripts use it: betas 0.9 and 0.999, eps 1e-8."""
    # On a processor the fused step is not the default, though it makes no temporary tensors.
    fused = True if not torch.accelerator.is_available() else None
    return torch.optim.AdamW(groups(model, stage), betas=(0.9, 0.999), eps=1e-8, fused=fused)


def factor(step: int, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """What a learning rate is multiplied by in step `step`, counted from 0.

    It rises linearly over the warm-up and then falls to 0 as half a cosine or a line, or stays.
    one_cycle: from 1 / 25 up and down to 1 / 250,000, both as half a cosine, as torch's OneCycleLR.
    """
    if schedule == "one_cycle":
        return one_cycle(step, steps, warmup_steps, (1 / 25, 1.0, 1 / 250_000))
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done


def one_cycle(
    step: int, steps: int, warmup_steps: int, values: tuple[float, float, float]
) -> float:
    """From the first value to the second in the last step of the warm-up, to the third at the end.

    Along half a cosine each (Smith and Topin, arXiv 1708.07120, as in torch's OneCycleLR).
    """
    top = max(warmup_steps - 1, 0)
    rising = step <= top and top > 0
    begun, ended = values[:2] if rising else values[1:]
    done = step / top if rising else (step - top) / max(steps - 1 - top, 1)
    return ended + (begun - ended) / 2 * (1 + math.cos(math.pi * done))


def set_rates(optimizer: Any, step: int, steps: int, warmup_steps: int, kind: Schedule) -> None:
    """Every group's rate in step `step`, counted from 0: its base rate times `factor`.

    one_cycle also moves Adam's first beta, from 0.95 to 0.85 and back, as OneCycleLR does.
    """
    value = factor(step, steps, warmup_steps, kind)
    for group in optimizer.param_groups:
        group["lr"] = group["base_rate"] * value
        if kind == "one_cycle":
            beta = one_cycle(step, steps, warmup_steps, (0.95, 0.85, 0.95))
            group["betas"] = (beta, group["betas"][1])
