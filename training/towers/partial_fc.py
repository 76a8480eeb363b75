"""PartialFC: margin softmax over very many classes, split over the ranks and sampled.

An et al., arXiv 2203.15565 (class sampling) and UNICOM, arXiv 2304.05884 (channel sampling).
Source of the behaviour: deepglint/unicom, its PartialFC_V2 and CombinedMarginLoss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.toolkit.errors import ConfigError
from edgevlm.training.towers.class_matrix import ClassMatrix
from edgevlm.training.towers.ranks import gather_rows, log_sum_exp, mean_of_images, total

_MOST_LOSS = -math.log(1e-30)  # the original computes with probabilities of at least 1e-30
_MOST_LOGIT = 64.0  # products of vectors that are not normalised are clipped to this


@dataclass(frozen=True)
class Margin:
    """What is done to the cosines of a batch before the softmax.

    angle: added to the angle of the right class, in radians (ArcFace, arXiv 1801.07698).
    cosine: subtracted from its cosine (CosFace, arXiv 1801.09414); above 0 it replaces the angle.
    filter_above: cosines of other classes above this count as 0; 0 for no filter.
    scale: factor of the logits; with 1 the original returns plain products, and so do we.
    """

    scale: float = 32.0
    angle: float = 0.3
    cosine: float = 0.0
    filter_above: float = 0.0


def margin_logits(cosines: Tensor, labels: Tensor, margin: Margin) -> Tensor:
    """cosines [B, C] and labels [B] (-1: the class is not among the C) -> logits [B, C].

    The margin is a constant for gradients: the original changes the right class's cosine without
    recording it, so its derivative is that of `scale * cosine`, NOT of cos(acos(x) + angle).
    An angle beyond pi gets no special treatment.
    """
    if margin.scale == 1.0:
        return cosines
    has = labels >= 0
    right = labels.clamp(min=0)[:, None]
    if margin.filter_above > 0:
        cosines = cosines.masked_fill(_filtered(cosines, right, has, margin.filter_above), 0.0)
    own = cosines.detach().gather(1, right)[:, 0]
    if margin.cosine > 0:
        shift = torch.full_like(own, -margin.cosine)
    else:
        shift = (own.acos() + margin.angle).cos() - own
    return cosines.scatter_add(1, right, torch.where(has, shift, 0)[:, None]) * margin.scale


def _filtered(cosines: Tensor, right: Tensor, has: Tensor, above: float) -> Tensor:
    """Which cosines are above the threshold and not the right class's, as a mask [B, C]."""
    high = cosines > above
    return high.scatter(1, right, high.gather(1, right) & ~has[:, None])


class PartialFC(nn.Module):
    """The head of UNICOM's training: embeddings and labels of this rank -> the mean loss of all.

    sample_rate: share of a rank's classes that one step compares with; those of the batch always
    belong to them. num_channels: channels of embeddings and classes that one step uses, chosen
    anew each time, before normalising; None for all. normalise: False compares by plain products.
    Sampling takes place in training mode only; both choices follow from `seed` and the step.
    Raises ConfigError for a rate or a number of channels that is out of range, and for ArcFace
    without normalising.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        margin: Margin = Margin(),  # noqa: B008 (a frozen value)
        *,
        sample_rate: float = 1.0,
        num_channels: int | None = None,
        normalise: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < sample_rate <= 1:
            raise ConfigError(f"sample_rate = {sample_rate}, expected above 0 and at most 1")
        if num_channels is not None and not 0 < num_channels <= channels:
            raise ConfigError(f"num_channels = {num_channels}, expected 1 to {channels}")
        if not normalise and margin.scale != 1 and margin.cosine <= 0:
            raise ConfigError(
                "a margin of the angle needs cosines, and products are not normalised",
                hint="take scale 1 for plain products, or normalise",
            )
        self.matrix = ClassMatrix(num_classes, channels, seed=seed)
        self.margin, self.normalise = margin, normalise
        self.sample_rate, self.num_channels = sample_rate, num_channels

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        classes: Tensor | None = None,
        channels: Tensor | None = None,
    ) -> Tensor:
        """embeddings [B, channels], labels [B] int64 (same B on all ranks) -> the mean loss.

        Rows with the label ranks.FILLER do not count.

        classes: rows of this rank's matrix to compare with, sorted, the batch's among them;
        channels: those to use, in this order. Without them they are drawn as configured.
        The gradient of the embeddings carries the factor that `ranks.gather_rows` describes; that
        of the classes does not. Computes in float32, also under autocast.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            x, weight = gather_rows(_wide(embeddings)), _wide(self.matrix.weight)
            labels = gather_rows(labels)
            own = self.matrix.local(labels)
            classes = self._classes(own) if classes is None else classes
            channels = self._channels(x.shape[1]) if channels is None else channels
            if classes is not None:
                classes = classes.to(own.device)
                weight = weight[classes]
                own = torch.where(own >= 0, torch.searchsorted(classes, own), -1)
            if channels is not None:
                channels = channels.to(own.device)
                x, weight = x[:, channels], weight[:, channels]
            if self.training:
                self.matrix.drawn()
            logits = margin_logits(self._products(x, weight), own, self.margin)
            return mean_of_images(_cross_entropy(logits, own), labels)

    def _products(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.normalise:
            return F.linear(F.normalize(x), F.normalize(weight)).clamp(-1, 1)
        return F.linear(x, weight).clamp(-_MOST_LOGIT, _MOST_LOGIT)

    def _classes(self, own: Tensor) -> Tensor | None:
        if not self.training or self.sample_rate == 1:
            return None
        count = int(self.sample_rate * len(self.matrix.own))
        generator = self.matrix.generator(same_on_all_ranks=False)
        return sample_classes(own, len(self.matrix.own), count, generator)

    def _channels(self, width: int) -> Tensor | None:
        if not self.training or self.num_channels in (None, width):
            return None
        # All ranks have to drop the same channels: their logits enter one softmax.
        generator = self.matrix.generator(same_on_all_ranks=True)
        return torch.randperm(width, generator=generator)[: self.num_channels]


def sample_classes(
    labels: Tensor, num_classes: int, count: int, generator: torch.Generator
) -> Tensor:
    """`count` of the classes, sorted int64; those of the batch (labels >= 0) are among them.

    If the batch has more classes than that, it is the batch's classes alone.
    """
    positive: Tensor = labels[labels >= 0].unique()  # type: ignore[no-untyped-call]
    if len(positive) >= count:
        return positive
    scores = torch.rand(num_classes, generator=generator).to(labels.device)
    scores[positive] = 2.0
    return scores.topk(count).indices.sort().values


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """For each row; the classes of all ranks are in the softmax. labels: -1 elsewhere."""
    right = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    losses = log_sum_exp(logits, over_ranks=True) - total(torch.where(labels >= 0, right, 0))
    # The bound changes the number that is reported, not the gradient.
    return losses - (losses - _MOST_LOSS).clamp(min=0).detach()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
