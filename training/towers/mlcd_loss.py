"""MLCD's loss: every image has several positive classes, and the rest are sampled negatives.

An et al., arXiv 2407.17331: Eq. 5 (MLCD) and Eq. 4 (MLC). The paper's equations show neither the
scale nor the margin that its text speaks of; with scale 1 and margin 0 these are the equations.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.toolkit.errors import ConfigError
from edgevlm.training.towers.class_matrix import ClassMatrix
from edgevlm.training.towers.ranks import gather_rows, log_sum_exp, mean_of_images


def mlcd_loss(
    features: Tensor,
    centres: Tensor,
    labels: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.0,
    sampled: Tensor | None = None,
) -> Tensor:
    """Eq. 5: mean of log(1 + sum of exp(-s) over positives) + log(1 + sum of exp(s), negatives).

    features [B, d] and centres [K, d] are normalised here; s = scale * cosine. labels [B, l] int64
    are the positives of each image, -1 for none. margin: added to the angle of positives, in
    radians, with its true derivative. sampled: classes that may be negatives (a random r * K of
    them, drawn anew each step), all by default; the image's own positives never are.
    Computes in float32 (float64 stays), by log-sum-exp: exp(64) would not fit into half precision.
    """
    with torch.autocast(features.device.type, enabled=False):
        sums = _log_sums(features, centres, labels, scale, margin, sampled, over_ranks=False)
        return (F.softplus(sums[0]) + F.softplus(sums[1])).mean()


def mlc_loss(
    features: Tensor,
    centres: Tensor,
    labels: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.0,
    sampled: Tensor | None = None,
) -> Tensor:
    """Eq. 4: mean of log(1 + sum of exp(s) over negatives * sum of exp(-s) over positives).

    Arguments are those of `mlcd_loss`.
    """
    with torch.autocast(features.device.type, enabled=False):
        sums = _log_sums(features, centres, labels, scale, margin, sampled, over_ranks=False)
        return F.softplus(sums[0] + sums[1]).mean()


class MlcdHead(nn.Module):
    """The head of MLCD's training: embeddings and labels of this rank -> the mean loss of all.

    The classes are split over the ranks. sample_rate: the paper's r, the share of classes that one
    step draws negatives from (in training mode). Raises ConfigError if it is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        scale: float = 64.0,
        margin: float = 0.3,
        sample_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < sample_rate <= 1:
            raise ConfigError(f"sample_rate = {sample_rate}, expected above 0 and at most 1")
        self.matrix = ClassMatrix(num_classes, channels, seed=seed)
        self.scale, self.margin, self.sample_rate = scale, margin, sample_rate

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, sampled: Tensor | None = None
    ) -> Tensor:
        """embeddings [B, channels], labels [B, l] int64, -1 for none (same B on all ranks);
        rows with labels of ranks.FILLER do not count.

        sampled: rows of this rank's matrix that may be negatives, instead of drawing them.
        The gradient of the embeddings carries the factor that `ranks.gather_rows` describes.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            x = gather_rows(_wide(embeddings))
            labels = gather_rows(labels)
            own = self.matrix.local(labels)
            if sampled is None and self.training and self.sample_rate < 1:
                sampled = self._draw()
            if self.training:
                self.matrix.drawn()
            weight = self.matrix.weight
            sums = _log_sums(x, weight, own, self.scale, self.margin, sampled, over_ranks=True)
            return mean_of_images(F.softplus(sums[0]) + F.softplus(sums[1]), labels)

    def _draw(self) -> Tensor:
        classes = len(self.matrix.own)
        generator = self.matrix.generator(same_on_all_ranks=False)
        order = torch.randperm(classes, generator=generator)
        return order[: max(round(self.sample_rate * classes), 1)]


def _log_sums(
    features: Tensor,
    centres: Tensor,
    labels: Tensor,
    scale: float,
    margin: float,
    sampled: Tensor | None,
    *,
    over_ranks: bool,
) -> tuple[Tensor, Tensor]:
    """log of the sum of exp(-s) over positives and of exp(s) over negatives, each [B]."""
    x, centres = F.normalize(_wide(features)), _wide(centres)
    rows = F.normalize(centres[labels.clamp(min=0)], dim=-1)
    positive = scale * _with_margin((rows @ x[:, :, None])[..., 0], margin)
    positive = (-positive).masked_fill(labels < 0, -math.inf)
    if sampled is not None:
        sampled = torch.unique(sampled.to(labels.device))
        centres = centres[sampled]
    negative = scale * F.linear(x, F.normalize(centres))
    negative = negative.masked_fill(_hits(labels, negative, sampled), -math.inf)
    return (
        log_sum_exp(positive, over_ranks=over_ranks),
        log_sum_exp(negative, over_ranks=over_ranks),
    )


def _with_margin(cosines: Tensor, margin: float) -> Tensor:
    """cos(acos(x) + margin), written so that its derivative stays finite at x = 1."""
    if margin == 0:
        return cosines
    sines = (1 - cosines.square()).clamp(min=1e-12).sqrt()
    return cosines * math.cos(margin) - sines * math.sin(margin)


def _hits(labels: Tensor, negative: Tensor, sampled: Tensor | None) -> Tensor:
    """Which columns of `negative` [B, C] are positives of their row, as a mask."""
    columns = labels
    if sampled is not None:
        columns = torch.searchsorted(sampled, labels).clamp(max=len(sampled) - 1)
        columns = torch.where(sampled[columns] == labels, columns, -1)
    mask = torch.zeros(negative.shape[0], negative.shape[1] + 1, dtype=torch.bool)
    mask = mask.to(labels.device)
    # The extra column takes the marks of labels that are not among the columns.
    return mask.scatter(1, torch.where(columns < 0, negative.shape[1], columns), True)[:, :-1]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
