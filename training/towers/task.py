"""What a tower is trained for: telling classes apart. The head's classes are split over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.training.towers.parts import Head, nearest_class
from edgevlm.training.towers.ranks import FILLER, place, total
from edgevlm.training.vlm import Batch


@dataclass(frozen=True)
class ClassTask:
    """The head's loss, see loop.Task; batches are those of tower_data.Pictures.

    bare: the tower without what wraps it for several processes. device: of this process. single:
    labels are [B], as PartialFC takes them, and not [B, l].
    """

    bare: nn.Module
    head: Head
    device: Any
    single: bool

    def counts(self, batch: Batch) -> tuple[int, int, int]:
        """Images, each of them one target."""
        count = int(batch["images"])
        return count, count, count

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """This rank's part of the sum over the images of all ranks."""
        x, labels = self._embedded(model, batch)
        loss: Tensor = self.head(x, labels)
        return loss * self._share(labels)

    def judge(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed loss over all classes, images whose nearest class is one of theirs, images.

        Uses the bare tower: what wraps it would synchronise buffers.
        """
        x, labels = self._embedded(self.bare, batch)
        self.head.eval()
        loss = self.head(x, labels) * self._share(labels)
        self.head.train()
        several = labels.reshape(len(labels), -1)
        right = (nearest_class(x, self.head.matrix)[:, None] == several).any(1)
        count = torch.tensor(batch["images"], device=self.device)
        return torch.stack([value.double().cpu() for value in (loss, right.sum(), count)])

    def _embedded(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings and labels, as many rows on all ranks; those of fillers are zeros."""
        labels: Tensor = batch["labels"].to(self.device, non_blocking=True)
        x: Tensor = model(batch["pixels"].to(self.device, non_blocking=True))
        x = F.pad(x, (0, 0, 0, max(len(labels) - len(x), 0)))[: len(labels)]
        return x, labels[:, 0] if self.single else labels

    def _share(self, labels: Tensor) -> Tensor:
        """Images of all ranks in this batch, over the number of ranks.

        The head gives every rank the same mean over all images. Times this, it adds up over ranks
        to the sum over all images, as the losses of models do that see their own samples only.
        """
        images = (labels.reshape(len(labels), -1)[:, 0] != FILLER).sum().float()
        return total(images) / place()[1]
