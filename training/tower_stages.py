"""The published trainings of vision towers as data, and what each needs: head, optimizer, step.

Sources: MLCD, arXiv 2407.17331; UNICOM, arXiv 2304.05884, and the scripts of deepglint/unicom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from edgevlm.toolkit.errors import ConfigError
from edgevlm.training.mlcd_loss import MlcdHead
from edgevlm.training.partial_fc import Margin, PartialFC

Head = MlcdHead | PartialFC


@dataclass(frozen=True)
class TowerStage:
    """One training of a tower.

    loss: whose head it has. num_classes: None where the data decide. labels: positive classes of
    an image. sample_rate: share of the classes that a step compares with. num_channels: channels
    that a step uses, None for all. global_batch: images of a step on all ranks together.
    head_factor: learning rate of the class matrix over that of the tower. warmup_share: of all
    steps. area: shares of an image that a crop may have. ours: fields whose values were not
    published and are our choice.
    """

    name: str
    loss: Literal["mlcd", "partial_fc"]
    image_size: int
    num_classes: int | None
    epochs: int
    global_batch: int
    learning_rate: float
    labels: int = 1
    scale: float = 32.0
    margin: float = 0.3
    cosine_margin: float = 0.0
    filter_above: float = 0.0
    sample_rate: float = 1.0
    num_channels: int | None = None
    head_factor: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "one_cycle"] = "one_cycle"
    warmup_share: float = 0.1
    drop_path: float = 0.0
    area: tuple[float, float] = (0.4, 1.0)
    ours: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = set(self.ours) - {field.name for field in fields(self)}
        assert not unknown, unknown


_MLCD = TowerStage(
    name="mlcd-tower",
    loss="mlcd",
    image_size=224,
    num_classes=1_000_000,
    labels=8,
    epochs=32,
    global_batch=32_768,
    learning_rate=1e-3,
    weight_decay=0.2,
    sample_rate=0.1,
    scale=64.0,
    margin=0.3,
    betas=(0.9, 0.98),
    schedule="cosine",
    warmup_share=0.05,
    ours=("scale", "margin", "betas", "schedule", "warmup_share", "head_factor", "area"),
)

_UNICOM = TowerStage(
    name="unicom-tower",
    loss="partial_fc",
    image_size=224,
    num_classes=1_000_000,
    epochs=32,
    global_batch=32_768,
    learning_rate=1e-3,
    weight_decay=0.05,
    sample_rate=0.1,
    num_channels=512,
    drop_path=0.1,
    ours=(
        "epochs", "global_batch", "learning_rate", "weight_decay", "sample_rate", "num_channels",
        "scale", "margin", "head_factor", "betas", "schedule", "warmup_share", "area",
    ),
)  # fmt: skip

# Fine-tuning for retrieval: the scripts' values. Their batches are 16 to 128 images a GPU.
_RETRIEVAL = TowerStage(
    name="unicom-sop",
    loss="partial_fc",
    image_size=224,
    num_classes=11_318,
    epochs=64,
    global_batch=1024,
    learning_rate=1e-5,
    margin=0.25,
    num_channels=512,
    head_factor=10.0,
    drop_path=0.1,
    ours=("global_batch", "area"),
)

STAGES: Mapping[str, TowerStage] = {
    stage.name: stage
    for stage in (
        _MLCD,
        replace(
            _MLCD,
            name="mlcd-tower-336",
            image_size=336,
            epochs=1,
            learning_rate=1e-4,
            ours=(*_MLCD.ours, "global_batch", "learning_rate", "weight_decay", "sample_rate"),
        ),
        _UNICOM,
        _RETRIEVAL,
        replace(_RETRIEVAL, name="unicom-in-shop", num_classes=None),
        replace(_RETRIEVAL, name="unicom-inaturalist", num_classes=5690, margin=0.35),
        replace(
            _RETRIEVAL,
            name="unicom-landmarks",
            image_size=512,
            num_classes=81_314,
            margin=0.5,
            sample_rate=0.5,
            num_channels=None,
            head_factor=3.0,
            learning_rate=1e-4,
            ours=(*_RETRIEVAL.ours, "learning_rate", "epochs", "num_channels"),
        ),
    )
}


def find_stage(name: str) -> TowerStage:
    """The stage called `name`. Raises ConfigError naming the known ones."""
    if name not in STAGES:
        known = ", ".join(STAGES)
        raise ConfigError(f"there is no tower stage {name!r}", hint=f"known: {known}")
    return STAGES[name]


def make_head(
    stage: TowerStage, channels: int, *, num_classes: int | None = None, seed: int = 0
) -> Head:
    """The stage's head for embeddings of `channels`; each rank gets its own classes.

    num_classes: of the data, where it is not the published number. Raises ConfigError if neither
    states it.
    """
    count = num_classes or stage.num_classes
    if count is None:
        raise ConfigError(f"{stage.name}: the number of classes follows from the data; state it")
    if stage.loss == "mlcd":
        return MlcdHead(
            count,
            channels,
            scale=stage.scale,
            margin=stage.margin,
            sample_rate=stage.sample_rate,
            seed=seed,
        )
    margin = Margin(stage.scale, stage.margin, stage.cosine_margin, stage.filter_above)
    used = min(stage.num_channels or channels, channels)
    return PartialFC(
        count, channels, margin, sample_rate=stage.sample_rate, num_channels=used, seed=seed
    )


def make_optimizer(stage: TowerStage, tower: nn.Module, head: Head) -> AdamW:
    """AdamW with the stage's learning rates. Norms, biases and single vectors do not decay (ours).

    Groups in this order: matrices of the tower, its vectors, the class matrix.
    """
    trained = [p for p in tower.parameters() if p.requires_grad]
    rate, decay = stage.learning_rate, stage.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "lr": rate, "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "lr": rate, "weight_decay": 0.0},
        {
            "params": list(head.parameters()),
            "lr": rate * stage.head_factor,
            "weight_decay": decay,
        },
    ]
    return AdamW(groups, betas=stage.betas)


def make_schedule(stage: TowerStage, optimizer: Optimizer, steps: int) -> LRScheduler:
    """The learning rates over `steps` optimizer steps; call its `step` after each.

    one_cycle: torch's OneCycleLR with its defaults, up to each group's rate and down, by cosine.
    cosine: a linear warm-up, then a cosine down to 0.
    """
    if stage.schedule == "one_cycle":
        highest = [float(group["lr"]) for group in optimizer.param_groups]
        return OneCycleLR(optimizer, highest, total_steps=steps, pct_start=stage.warmup_share)
    warm = max(round(stage.warmup_share * steps), 1)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min((step - warm) / max(steps - warm, 1), 1.0)))

    return LambdaLR(optimizer, factor)


def step(tower: nn.Module, head: Head, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean loss of a batch over all ranks, to be differentiated.

    batch: "pixels" [B, 3, height, width]; "labels" int64, [B] for PartialFC, [B, l] for MLCD
    (-1 for none). B is the same on all ranks. `tower` may be wrapped for several processes, `head`
    must not be: it splits its classes itself.
    """
    loss: Tensor = head(tower(batch["pixels"]), batch["labels"])
    return loss


def class_accuracy(embeddings: Tensor, head: Head, labels: Tensor) -> float:
    """Share of embeddings [B, d] whose nearest class is among their labels [B] or [B, l].

    By cosine, on one rank, which then holds all classes.
    """
    with torch.no_grad():
        weight = nn.functional.normalize(head.matrix.weight)
        found = (nn.functional.normalize(embeddings.float()) @ weight.T).argmax(1)
        right = (found[:, None] == labels.reshape(len(labels), -1)).any(1)
        return float(right.float().mean())
