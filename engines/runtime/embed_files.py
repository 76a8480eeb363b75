"""The work of `edgevlm embed`: files to one file of embeddings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from edgevlm.engines import manifest
from edgevlm.engines.runtime import feature_file
from edgevlm.engines.runtime.embedding import Embedder, normalised
from edgevlm.engines.runtime.feature_file import Unfinished
from edgevlm.engines.runtime.memory import peak_rss_mb
from edgevlm.toolkit.bundle.atomic import sha256_of
from edgevlm.toolkit.errors import InputError


@dataclass(frozen=True)
class EmbedResult:
    """What `edgevlm embed --json` prints. seconds, images_per_s: of this run alone.

    images: rows of the output. bad: reasons by file. resumed: files that an earlier run had read.
    """

    engine: str
    output: str
    images: int
    bad: dict[str, str]
    channels: int
    normalized: bool
    resumed: int
    batch: int
    seconds: float
    images_per_s: float
    load_ms: float
    peak_rss_mb: float


def embed_files(
    folder: Path,
    files: Sequence[str],
    out: Path,
    *,
    normalize: bool,
    batch: int,
    threads: int,
    done: Callable[[int], None],
) -> EmbedResult:
    """Write the embeddings of `files` to `out`; a killed run goes on when the same is asked again.

    done: told how many files have been read. Raises ToolkitError; InputError if no image is good.
    """
    with Embedder.open(folder, threads=threads, batch=batch) as embedder:
        engine, channels = sha256_of(folder / manifest.DESCRIPTION), embedder.model.channels
        depends = engine, normalize, [(file, *_stamp(file)) for file in files]
        with feature_file.beside(out, channels, *depends) as kept:
            resumed, started = kept.read, time.perf_counter()
            done(resumed)
            found = embedder.embed(files[resumed:])
            while group := list(islice(found, batch)):
                good = [e.vector for e in group if e.vector is not None]
                rows = np.stack(good) if good else np.zeros((0, channels), np.float32)
                rows = normalised(rows) if normalize else rows
                kept.add(len(group), rows, {e.name: e.reason for e in group if e.vector is None})
                done(kept.read)
            seconds = time.perf_counter() - started
            _require_one(kept, files)
            kept.write(out, files)
        return EmbedResult(
            str(folder),
            str(out),
            kept.rows,
            kept.bad,
            channels,
            normalize,
            resumed,
            batch,
            round(seconds, 3),
            round((len(files) - resumed) / max(seconds, 1e-9), 3),
            round(embedder.load_ms, 1),
            round(peak_rss_mb(), 1),
        )


def _stamp(file: str) -> tuple[int, int]:
    """Size and time of the last change; of a file that is not there zeros."""
    try:
        found = os.stat(file)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _require_one(kept: Unfinished, files: Sequence[str]) -> None:
    if not kept.rows:
        name = next(iter(kept.bad))
        raise InputError(f"none of {len(files)} images can be read; the first: {kept.bad[name]}")


def lines(result: EmbedResult) -> list[str]:
    """The result for people."""
    rows = [f"{result.output}: {result.images} embeddings of {result.channels} channels"]
    if result.bad:
        rows = [*(f"left out: {reason}" for reason in result.bad.values()), *rows]
        rows.append(f"{len(result.bad)} of {result.images + len(result.bad)} images left out")
    if result.resumed:
        rows.append(f"{result.resumed} of them by an earlier run")
    rows.append(f"{result.images_per_s:.3g} images/s, {result.peak_rss_mb:.0f} MB at most")
    return rows
