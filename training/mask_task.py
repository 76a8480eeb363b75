"""What MLCD-Seg is trained for: the tokens of the answers, and the masks of their [SEG]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.toolkit.images.longest_side import Size
from edgevlm.training.answer_task import AnswerTask
from edgevlm.training.vlm import Batch, token_loss

BCE_WEIGHT, DICE_WEIGHT = 2.0, 0.5
_SCALE, _EPS = 1000.0, 1e-6
_COUNT_EPS = 1e-8


@dataclass(frozen=True)
class MaskTask(AnswerTask):
    """Cross entropy of the answers' tokens, and 2 BCE + 0.5 DICE of masks, see loop.Task.

    side: pixels of the square that the encoder of masks sees. Of a forward pass the loss is the
    original's: the mean over its targets plus the mean over its masks (deepglint/unicom,
    mlcd_vl/downstream). Passes of a step count by their targets.
    """

    side: int = 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the targets."""
        logits, low = model(**self._inputs(batch))
        targets = batch["targets"].to(logits.device)
        return token_loss(logits, targets) + self._masks(low, batch, targets)

    def judge(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed loss, targets that are predicted greedily, targets."""
        logits, low = model(**self._inputs(batch))
        targets = batch["targets"].to(logits.device)
        loss = token_loss(logits, targets) + self._masks(low, batch, targets)
        right = (logits.argmax(-1) == targets).sum()
        values = (loss, right, (targets != -100).sum())
        return torch.stack([value.double().cpu() for value in values])

    def _masks(self, low: Tensor, batch: Batch, targets: Tensor) -> Tensor:
        """By the pass's number of targets, as the step's sum is divided by all of them."""
        return (targets != -100).sum() * mask_loss(low, batch["mask_targets"], self.side)


def mask_loss(low: Tensor, targets: list[tuple[Tensor, Size]], side: int) -> Tensor:
    """2 BCE + 0.5 DICE, each the mean over masks; 0 that keeps gradients alive without any.

    low [N, h, w]: logits as the decoder gives them; targets: of each mask its own, bool [height,
    width], and the image's height and width in the square of `side` pixels.
    """
    if not targets:
        return 0.0 * low.float().sum()
    bce, dice = low.new_zeros((), dtype=torch.float32), low.new_zeros((), dtype=torch.float32)
    for logits, (target, inner) in zip(low.float(), targets, strict=True):
        found = enlarged(logits, side, inner, (target.shape[0], target.shape[1]))
        wanted = target.to(found.device, torch.float32)
        bce = bce + F.binary_cross_entropy_with_logits(found, wanted)
        dice = dice + dice_loss(found, wanted)
    count = len(targets) + _COUNT_EPS
    return (BCE_WEIGHT * bce + DICE_WEIGHT * dice) / count


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - 2 p.t / (p + t) of a mask, all sums by thousands of pixels; 0 where both are empty."""
    p = logits.sigmoid()
    joint, both = (p * target).sum() / _SCALE, (p.sum() + target.sum()) / _SCALE
    return 1 - (2 * joint + _EPS) / (both + _EPS)


def enlarged(low: Tensor, side: int, inner: Size, size: Size) -> Tensor:
    """toolkit.images.longest_side.mask_logits with gradients."""
    square = F.interpolate(low[None, None], (side, side), mode="bilinear", align_corners=False)
    cut = square[..., : inner[0], : inner[1]]
    return F.interpolate(cut, size, mode="bilinear", align_corners=False)[0, 0]
