"""Folders of labelled images and their embeddings, for the tasks of towers by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.engines.runtime import image_list
from edgevlm.engines.runtime.embedding import Embedder
from edgevlm.toolkit.errors import ConfigError, DataError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.terminal.console import table


@dataclass(frozen=True)
class TowerScores:
    """What a task found. values: the keys of --json; lines: the same for people.

    files: what was read beside the images; settings: the options as they were used; failed: images
    that could not be read, each with its reason.
    """

    values: Mapping[str, Any]
    lines: tuple[str, ...]
    files: tuple[Path, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelledImages:
    """Files and their labels: the number of the class folder, in the order of all names."""

    files: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class LabelledEmbeddings:
    """float32 [N, channels] and int64 [N]."""

    embeddings: Array
    labels: Array


@dataclass(frozen=True)
class Found:
    """Embeddings by the name of the set, and why images are not among them."""

    sets: Mapping[str, LabelledEmbeddings]
    failed: tuple[str, ...]


def sets_in(
    folder: Path, names: tuple[str, str], *, both: bool = False
) -> dict[str, LabelledImages]:
    """The labelled images of a folder: of its folders `names`, or else of itself, under "".

    A set has a folder for each class. Classes of both sets are numbered together. both: the two
    must be there. Raises DataError.
    """
    parts = {name: folder / name for name in names}
    there = [name for name, part in parts.items() if part.is_dir()]
    if len(there) == 1 or (both and not there):
        lacking = " and ".join(sorted(set(names) - set(there)))
        hint = f"it has folders {' and '.join(names)}, each with a folder for each class"
        raise DataError(f"{folder} lacks {lacking}", hint=hint)
    roots = parts if there else {"": folder}
    classes = sorted({name for root in roots.values() for name in _classes(root)})
    numbers = {name: number for number, name in enumerate(classes)}
    return {name: _labelled(root, numbers) for name, root in roots.items()}


def _classes(root: Path) -> list[str]:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not found:
        raise DataError(f"{root} holds no folders: one for each class, with its images")
    return found


def _labelled(root: Path, numbers: Mapping[str, int]) -> LabelledImages:
    files, labels = list[str](), list[int]()
    for name in _classes(root):
        inside = list(image_list.below(root / name))
        files += inside
        labels += [numbers[name]] * len(inside)
    if not files:
        raise DataError(f"{root} holds no images")
    return LabelledImages(tuple(files), tuple(labels))


def embedded(request: Any, sets: Mapping[str, LabelledImages]) -> Found:
    """The embeddings of all sets, by the engine of a tower.

    request: its `engine`, `threads`, and `limit`, the most images of a set. Raises DataError for
    a set of which no image can be read.
    """
    found, failed = dict[str, LabelledEmbeddings](), list[str]()
    with Embedder.open(request.engine, threads=request.threads) as tower:
        for name, images in sets.items():
            files, labels = images.files[: request.limit], images.labels[: request.limit]
            request.progress(f"embedding {len(files)} images{f' of {name}' if name else ''}")
            vectors, kept = list[Array](), list[int]()
            for one, label in zip(tower.embed(files), labels, strict=True):
                if one.vector is None:
                    failed.append(one.reason)
                else:
                    vectors.append(one.vector)
                    kept.append(label)
            if not vectors:
                raise DataError(f"no image{f' of {name}' if name else ''} can be read: {failed[0]}")
            found[name] = LabelledEmbeddings(np.stack(vectors), np.asarray(kept, np.int64))
    return Found(found, tuple(failed))


def channels_of(request: Any, found: Found) -> int | None:
    """How many of the first channels count. Raises ConfigError for more than there are."""
    channels: int | None = getattr(request, "channels", None)
    width = next(iter(found.sets.values())).embeddings.shape[1]
    if channels is not None and not 1 <= channels <= width:
        raise ConfigError(f"--channels {channels} is not from 1 to {width}")
    return channels


def scores(values: Mapping[str, float], found: Found, settings: Mapping[str, Any]) -> TowerScores:
    """The result of a task."""
    sizes = {name or "images": len(one.labels) for name, one in found.sets.items()}
    classes = len({int(label) for one in found.sets.values() for label in one.labels})
    every: dict[str, Any] = {**values, **sizes, "classes": classes}
    lines = table(("score", "value"), list(every.items()))
    return TowerScores(every, tuple(lines), (), settings, found.failed)
