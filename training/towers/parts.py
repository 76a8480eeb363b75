"""What a tower's training consists of beside the tower: head, optimizers, loss, nearest classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from edgevlm.toolkit.errors import ConfigError
from edgevlm.training.towers.class_matrix import ClassMatrix
from edgevlm.training.towers.mlcd_loss import MlcdHead
from edgevlm.training.towers.partial_fc import Margin, PartialFC
from edgevlm.training.towers.ranks import gather_rows, place
from edgevlm.training.towers.stages import TowerStage

Head = MlcdHead | PartialFC


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


def make_optimizers(stage: TowerStage, tower: nn.Module, head: Head) -> tuple[AdamW, AdamW]:
    """AdamW for the tower and for the class matrix, which is on no two ranks the same.

    Groups state the stage's learning rate as `base_rate`, for optimizer.set_rates. The tower's are
    its matrices, then its norms, biases and single vectors, which do not decay (ours).
    """
    trained = [p for p in tower.parameters() if p.requires_grad]
    rate, decay = stage.learning_rate, stage.weight_decay
    matrices = _group([p for p in trained if p.ndim > 1], rate, decay)
    vectors = _group([p for p in trained if p.ndim <= 1], rate, 0.0)
    classes = _group(list(head.parameters()), rate * stage.head_factor, decay)
    return AdamW([matrices, vectors], betas=stage.betas), AdamW([classes], betas=stage.betas)


def _group(parameters: list[nn.Parameter], rate: float, decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": rate, "base_rate": rate, "weight_decay": decay}


def step(tower: nn.Module, head: Head, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean loss of a batch over all ranks, to be differentiated.

    batch: "pixels" [B, 3, height, width]; "labels" int64, [B] for PartialFC, [B, l] for MLCD
    (-1 for none). B is the same on all ranks. `tower` may be wrapped for several processes, `head`
    must not be: it splits its classes itself.
    """
    loss: Tensor = head(tower(batch["pixels"]), batch["labels"])
    return loss


@torch.no_grad()
def nearest_class(embeddings: Tensor, matrix: ClassMatrix) -> Tensor:
    """The nearest class, by cosine, of each of this rank's embeddings [B, d]; B alike on all ranks.

    Every rank compares the embeddings of all with its own classes.
    """
    x = gather_rows(nn.functional.normalize(embeddings.float()))
    best = (x @ nn.functional.normalize(matrix.weight).T).max(1)
    cosines, classes = best.values, best.indices + matrix.own.start
    rank, ranks = place()
    if ranks > 1:
        all_cosines = [torch.empty_like(cosines) for _ in range(ranks)]
        all_classes = [torch.empty_like(classes) for _ in range(ranks)]
        dist.all_gather(all_cosines, cosines)
        dist.all_gather(all_classes, classes)
        winner = torch.stack(all_cosines).argmax(0)
        classes = torch.stack(all_classes).gather(0, winner[None])[0]
    return classes.view(ranks, -1)[rank]


def class_accuracy(embeddings: Tensor, head: Head, labels: Tensor) -> float:
    """Share of embeddings [B, d] whose nearest class is among their labels [B] or [B, l]."""
    found = nearest_class(embeddings, head.matrix)
    right = (found[:, None] == labels.reshape(len(labels), -1)).any(1)
    return float(right.float().mean())
