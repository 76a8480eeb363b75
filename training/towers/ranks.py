"""Sums and gathers over the processes of a training run; with one process, plain arithmetic.

They serve losses whose classes are split over the processes ("ranks"): every rank sees the whole
batch and its own classes, and all ranks compute the same loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FILLER = -2  # the labels of a row that stands for no image: every rank has equally many rows
_TINY = 1e-30  # a sum that is 0 has a logarithm, and its gradient is 0 instead of NaN


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks: (0, 1) outside a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(count: int, rank: int, ranks: int) -> range:
    """The numbers of 0 .. count that belong to a rank; the first count mod ranks get one more."""
    base, more = divmod(count, ranks)
    start = rank * base + min(rank, more)
    return range(start, start + base + (rank < more))


class _Gather(torch.autograd.Function):
    """All ranks' rows; see `gather_rows`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        _, ranks = place()
        parts = [torch.empty_like(x) for _ in range(ranks)]
        dist.all_gather(parts, x.contiguous())
        ctx.rows = x.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        rank, ranks = place()
        summed = gradients[0].clone()
        dist.all_reduce(summed)
        return summed.narrow(0, rank * ctx.rows, ctx.rows) * ranks


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all ranks in their order, [B, ...] -> [ranks * B, ...]; B is the same on each.

    Backwards, a rank gets the sum of all ranks' gradients for its rows TIMES THE NUMBER OF RANKS,
    as in PartialFC of deepglint/unicom: the tower's gradients are averaged over the ranks
    afterwards (by DDP), and with the factor their average is the gradient of the mean over the
    global batch. A caller that does not average must divide by the number of ranks.
    """
    if place()[1] == 1:
        return x
    if not x.is_floating_point():  # labels
        parts = [torch.empty_like(x) for _ in range(place()[1])]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)
    gathered: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return gathered


class _Total(torch.autograd.Function):
    """The sum over ranks. Every rank goes on to the same loss, so gradients pass unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        summed = x.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def total(x: Tensor) -> Tensor:
    """The sum of x over all ranks; backwards each rank's x gets the gradient of the sum."""
    if place()[1] == 1:
        return x
    summed: Tensor = _Total.apply(x)  # type: ignore[no-untyped-call]
    return summed


def mean_of_images(losses: Tensor, labels: Tensor) -> Tensor:
    """The mean over the rows that stand for an image: those whose labels are not FILLER.

    losses [B], labels [B] or [B, l], of all ranks. 0 if there is none.
    """
    counts = (labels.reshape(len(losses), -1)[:, 0] != FILLER).to(losses.dtype)
    return (losses * counts).sum() / counts.sum().clamp(min=1)


def log_sum_exp(x: Tensor, *, over_ranks: bool) -> Tensor:
    """log of the sum of exp over the last axis, [B, C] -> [B], float32 or float64.

    over_ranks: the classes of other ranks are columns too. -inf stands for a column that is not
    there; where none is there the result is very small but finite, and so are gradients.
    """
    largest = x.detach().amax(-1).clamp(min=-1e4)
    spread = over_ranks and place()[1] > 1
    if spread:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    summed = (x - largest[:, None]).exp().sum(-1)
    return largest + (total(summed) if spread else summed).clamp(min=_TINY).log()
