"""Samples as one batch of torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.images.tiling import ArrangedTokens
from edgevlm.toolkit.images.views import PreparedImage
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.training.data import masks
from edgevlm.training.data.masking import IGNORED
from edgevlm.training.data.prepare import SampleRules
from edgevlm.training.data.sample import Sample, lay_out, scored

if TYPE_CHECKING:
    import torch

Batch = dict[str, Any]
_FILLER = Sample("padding", ((0,),), ((IGNORED,),), (), 1)


def collate(samples: Sequence[Sample], rules: SampleRules) -> Batch:
    """A batch as tensors on the processor; B samples, S positions of the longest.

    - "pixels": for each encoder float32 [views, 3, height, width], the views of all images in
      order; without images one view of zeros, so that every parameter has a gradient.
    - "ids": int64 [B, S], 0 where an image is, and behind the end.
    - "rows": int64 [B, S], the feature row that a position takes, -1 where it takes none. Rows are
      those of all views, tokens_per_view each, then the newline's if there is one; or those of
      "placed_rows" if there are any.
    - "score": int64 [B, P], the positions whose next token is a target, padded with 0.
    - "targets": int64 [B, P], that token, padded with -100. P is at least 1.
    - "placed_rows" int64 and "placed_weights" float32, both [N, 4], if the arrangement computes:
      token i is the sum of the feature rows placed_rows[i], weighted, or their maximum.

    A model that makes masks has those of masks.collate too; then "score" ends with the positions of
    [SEG] tokens, which are no targets.

    No samples at all (each was broken) give one of padding, without a target.
    """
    samples = samples or [_FILLER]
    images = [image for sample in samples for image in sample.images]
    orders = _orders(images, rules)
    arrangement = rules.images.arrangement
    computes = arrangement is not None and arrangement.computes
    rows = _placed(orders) if computes else [order.rows[:, 0] for order in orders]
    batch: Batch = {"pixels": _pixels(images, rules.images)}
    score, text = _text(samples, rows, rules.max_length)
    batch |= text
    if rules.masks is not None:
        batch |= masks.collate([sample.masks for sample in samples], score, rules.masks)
    if computes:
        # One row that no position takes keeps the shapes of a batch without images alive.
        orders = orders or [ArrangedTokens(np.zeros((1, 4), np.int64), _first_weight())]
        batch["placed_rows"] = _tensor(np.concatenate([order.rows for order in orders]))
        batch["placed_weights"] = _tensor(np.concatenate([order.weights for order in orders]))
    return batch


def _first_weight() -> Array:
    return np.array([[1, 0, 0, 0]], np.float32)


def _orders(images: Sequence[PreparedImage], rules: SampleRules) -> list[ArrangedTokens]:
    """The tokens of each image as rows of the batch's features."""
    each = rules.tokens_per_view
    newline = sum(len(image.pixels) for image in images) * each
    orders, before = [], 0
    for image in images:
        own = len(image.pixels) * each
        if image.order is None:
            plain = np.arange(own, dtype=np.int64)
            order = ArrangedTokens(np.repeat(plain[:, None], 4, 1), np.empty((0, 4), np.float32))
        else:
            order = image.order
        moved = np.where(order.rows < own, order.rows + before, newline)
        orders.append(ArrangedTokens(moved, order.weights))
        before += own
    return orders


def _placed(orders: Sequence[ArrangedTokens]) -> list[Array]:
    """For each image the indices of its tokens among those of all images."""
    ends = np.cumsum([0, *(len(order.rows) for order in orders)])
    return [np.arange(a, b, dtype=np.int64) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def _pixels(images: Sequence[PreparedImage], rules: ImageRules) -> dict[str, torch.Tensor]:
    views = [view for image in images for view in image.pixels]
    views = views or [{n: np.zeros((3, *r.size), np.float32) for n, r in rules.encoders.items()}]
    return {name: _tensor(np.stack([view[name] for view in views])) for name in rules.encoders}


def _text(
    samples: Sequence[Sample], rows: Sequence[Array], limit: int | None
) -> tuple[list[Array], dict[str, torch.Tensor]]:
    """The scored positions of each sample, and what a batch has of texts."""
    laid, start = [], 0
    for sample in samples:
        own = rows[start : start + len(sample.images)]
        laid.append(lay_out(sample.runs, sample.labels, own, limit))
        start += len(sample.images)
    score = [scored(labels) for _, _, labels in laid]
    targets = [labels[at + 1] for at, (_, _, labels) in zip(score, laid, strict=True)]
    places = [np.array([m.place for m in s.masks.masks], np.int64) for s in samples]
    score = [np.concatenate(pair) for pair in zip(score, places, strict=True)]
    targets = [
        np.append(own, np.full(len(at), IGNORED, np.int64))
        for own, at in zip(targets, places, strict=True)
    ]
    return score, {
        "ids": _padded([ids for ids, _, _ in laid], 0),
        "rows": _padded([places for _, places, _ in laid], -1),
        "score": _padded(score, 0),
        "targets": _padded(targets, IGNORED),
    }


def _padded(arrays: Sequence[Array], fill: int) -> torch.Tensor:
    """int64 [arrays, longest], at least one long."""
    out = np.full((len(arrays), max(1, *map(len, arrays))), fill, np.int64)
    for line, array in zip(out, arrays, strict=True):
        line[: len(array)] = array
    return _tensor(out)


def _tensor(array: Array) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))
