"""Classes made by clustering: embed all images with the tower, cluster them, label them.

OUT/clusters/embeddings.npy   float16 [images, d], of the images that can be used
OUT/clusters/centres.npy      float32 [classes, d]
OUT/clusters/labels.npy       int32 [images, positives], the nearest first
OUT/clusters/held-out.npy     the labels of held-out images
A file that is complete is not made again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.training.feed import Feed
from edgevlm.training.setup import Say
from edgevlm.training.towers.clustering import (
    cluster,
    open_embeddings,
    write_embeddings,
    write_labels,
)
from edgevlm.training.towers.ranks import gather_rows
from edgevlm.training.towers.tower import Tower

FOLDER = "clusters"


@dataclass(frozen=True)
class Clustering:
    """What is clustered, and how. folder: for the files; positives: labels of an image."""

    tower: Tower
    folder: Path
    classes: int
    positives: int
    seed: int
    accelerator: Any
    say: Say


def check(classes: int, positives: int, images: int) -> None:
    """Raise ConfigError for numbers that cannot be."""
    if classes > images:
        raise ConfigError(f"{images} images cannot be put into {classes} clusters (--classes)")
    if positives > classes:
        raise ConfigError(
            f"{positives} classes an image, but there are {classes} clusters",
            hint=f"--positives N with N at most {classes}",
        )


def labels_of(c: Clustering, feed: Feed) -> Array:
    """The labels of the images of a feed, int32 [images, positives]; all processes call it."""
    embeddings, centres, labels = (
        c.folder / f"{name}.npy" for name in ("embeddings", "centres", "labels")
    )
    _embed(c, feed, embeddings)
    device = str(c.accelerator.device)
    if c.accelerator.is_main_process and not centres.exists():
        rows = open_embeddings(embeddings)
        c.say(f"clustering {len(rows):,} images into {c.classes:,} classes")
        found = cluster(rows, c.classes, seed=c.seed, device=device)
        partial = centres.with_name(".centres.partial.npy")
        np.save(partial, found.centres)
        os.replace(partial, centres)
        c.say(f"mean cosine to the nearest centre: {found.similarity[-1]:.3f}")
    _label(c, embeddings, labels)
    return np.asarray(np.load(labels))


def held_out_labels(c: Clustering, feed: Feed) -> Array:
    """The labels of held-out images, by the centres of the others."""
    embeddings, labels = c.folder / "held-out-embeddings.npy", c.folder / "held-out.npy"
    _embed(c, feed, embeddings)
    _label(c, embeddings, labels)
    return np.asarray(np.load(labels))


def _label(c: Clustering, embeddings: Path, labels: Path) -> None:
    if c.accelerator.is_main_process and not labels.exists():
        centres = np.load(c.folder / "centres.npy")
        device = str(c.accelerator.device)
        write_labels(open_embeddings(embeddings), centres, c.positives, labels, device=device)
    c.accelerator.wait_for_everyone()


def _embed(c: Clustering, feed: Feed, out: Path) -> None:
    """Write the embeddings of a feed's images, the first process those of all."""
    done = out.exists()
    c.accelerator.wait_for_everyone()
    if done:
        return
    c.folder.mkdir(exist_ok=True)
    assert feed.data.scanned is not None
    count = len(feed.data.scanned.usable)
    batches = _embeddings(c, feed, count)
    if c.accelerator.is_main_process:
        write_embeddings(batches, count, out)
    else:
        for _ in batches:
            pass
    c.accelerator.wait_for_everyone()


def _embeddings(c: Clustering, feed: Feed, count: int) -> Iterator[Array]:
    """All embeddings in order, a global batch at a time.

    An image that cannot be read, which is skipped in training, gets its neighbour's: the centres
    must not be drawn to something that is no image.
    """
    c.tower.eval()
    rows, told = feed.batching.batch, 0
    last: Tensor | None = None
    for number, batch in enumerate(feed.once()):
        with torch.no_grad():
            x = c.tower(batch["pixels"].to(c.accelerator.device))[: max(int(batch["images"]), 1)]
        last = x[-1:] if batch["images"] or last is None else last
        own = last.expand(rows, -1).clone()
        own[batch["places"]] = x[: int(batch["images"])]
        done = number * feed.batching.together
        together = gather_rows(own.float())[: count - done]
        done += len(together)
        if done * 10 // count > told or done == count:
            told = done * 10 // count
            c.say(f"embedding images: {done:,} of {count:,}")
        yield together.cpu().numpy()
    c.tower.train()
