"""What vision-language models are trained for: the tokens of the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgevlm.training.vlm import Batch, token_loss


@dataclass(frozen=True)
class AnswerTask:
    """Cross entropy of the answers' tokens, see loop.Task. device: of this process."""

    device: Any

    def counts(self, batch: Batch) -> tuple[int, int, int]:
        """Targets, tokens that are read, samples; a stand-in for broken samples is none."""
        lengths, ids = batch.get("lengths"), batch["ids"]
        tokens = ids.numel() if lengths is None else int(lengths.sum())
        return int((batch["targets"] != -100).sum()), tokens, len(ids) - bool(batch.get("filler"))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the targets."""
        return token_loss(model(**self._inputs(batch)), batch["targets"].to(self.device))

    def judge(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed loss, targets that are predicted greedily, targets."""
        logits = model(**self._inputs(batch))
        targets = batch["targets"].to(logits.device)
        right = (logits.argmax(-1) == targets).sum()
        values = (token_loss(logits, targets), right, (targets != -100).sum())
        return torch.stack([value.double().cpu() for value in values])

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """The model's inputs on the device of this process."""
        inputs: dict[str, Any] = {
            name: x.to(self.device, non_blocking=True)
            for name, x in batch.items()
            if isinstance(x, Tensor) and name not in ("targets", "lengths")
        }
        pixels = {n: x.to(self.device, non_blocking=True) for n, x in batch["pixels"].items()}
        return {**inputs, "pixels": pixels}
