"""Images with classes, for training vision towers: from folders, lists and tar shards.

A folder of images is read as torchvision's ImageFolder: a sub-folder is a class. A list is a .jsonl
or .json with {"image": PATH, "label": CLASS or [CLASSES]}, or a .csv with these columns. In shards,
KEY.cls or the "label" of KEY.json is the class. Classes are texts; a data set may have none.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from edgevlm.toolkit.errors import DataError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.training.data import tar_samples
from edgevlm.training.data.broken import (
    BROKEN_JSON,
    DAMAGED_SHARD,
    MISSING_IMAGE,
    NO_CLASS,
    STRUCTURE,
    BrokenSample,
)
from edgevlm.training.data.tar_samples import IMAGES, Entry

Classes: TypeAlias = tuple[str, ...]  # of one image; empty if the data do not say
_KINDS = "a folder of images, a .jsonl, .json or .csv list, or .tar shards"


@dataclass(frozen=True)
class Picture:
    """One image: its file, or its place in a shard; and the classes that it belongs to."""

    name: str
    place: Path | tuple[Path, int, int]
    classes: Classes = ()

    def read(self) -> Path | bytes:
        """The file, or the bytes. Raises BrokenSample for a shard that cannot be read."""
        if isinstance(self.place, Path):
            return self.place
        shard, offset, size = self.place
        try:
            return _bytes(shard, offset, size)
        except OSError as refused:
            raise BrokenSample(self.name, DAMAGED_SHARD, str(refused.strerror)) from None


Found: TypeAlias = "Picture | BrokenSample"


def open_images(path: Path, images: Path | None = None) -> list[Found]:
    """The images at `path` in an order that does not change; images: where lists' paths begin.

    Raises DataError if there is no such data set.
    """
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return [found for shard in tar_samples.shards(path) for found in _shard(shard)]
    if not path.exists():
        raise DataError(f"{path} does not exist", hint=f"images are {_KINDS}")
    if path.is_dir():
        return list(_folder(path))
    if path.suffix in (".jsonl", ".json", ".csv"):
        beside = images or path.parent
        return [_listed(item, f"{path.name}[{i}]", beside) for i, item in enumerate(_rows(path))]
    raise DataError(f"{path} holds no images", hint=f"images are {_KINDS}")


# -- folders -----------------------------------------------------------------------------------


def _folder(root: Path) -> Iterator[Found]:
    """Every image below a folder; its class is the first folder on the way to it."""
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(files):
            if name.startswith(".") or name.rpartition(".")[2].lower() not in IMAGES:
                continue
            path = Path(folder, name)
            below = path.relative_to(root)
            yield Picture(str(below), path, below.parts[:1] if len(below.parts) > 1 else ())


# -- lists -------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[Any]:
    """What a list states: an object for each image, or a BrokenSample for a broken line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
            elif path.suffix == ".json":
                yield from _whole(json.load(file), path)
            else:
                for number, line in enumerate(line for line in file if line.strip()):
                    yield _line(line, f"{path.name}[{number}]")
    except (OSError, ValueError, RecursionError, csv.Error) as broken:
        raise DataError(f"{path} cannot be read: {broken}") from None


def _whole(data: Any, path: Path) -> list[Any]:
    if not isinstance(data, list):
        raise DataError(f"{path} holds a {type(data).__name__}, expected a list of images")
    return data


def _line(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as broken:
        return BrokenSample(name, BROKEN_JSON, str(broken))


def _listed(item: Any, name: str, folder: Path) -> Found:
    if isinstance(item, BrokenSample):
        return item
    image = item.get("image") if isinstance(item, Mapping) else None
    if not isinstance(image, str) or not image:
        return BrokenSample(name, STRUCTURE, f"{item!r:.60} names no image")
    path = folder / image
    if not path.is_file():
        return BrokenSample(image, MISSING_IMAGE, str(path))
    return Picture(image, path, _classes(item.get("label")))


def _classes(label: Any) -> Classes:
    """Of a text, a number, or a list of them; an empty field of a .csv is none."""
    if label is None or label == "":
        return ()
    return tuple(map(str, label)) if isinstance(label, list) else (str(label),)


# -- shards ------------------------------------------------------------------------------------


def _shard(shard: Path) -> Iterator[Found]:
    for entry in tar_samples.entries(shard):
        yield entry if isinstance(entry, BrokenSample) else _entry(entry)


def _entry(entry: Entry) -> Found:
    found = [place for extension, place in entry.files.items() if extension in IMAGES]
    if len(found) != 1:
        return BrokenSample(entry.name, STRUCTURE, f"{len(found)} images, expected one")
    try:
        classes = _entry_classes(entry)
    except (OSError, ValueError, RecursionError) as broken:
        return BrokenSample(entry.name, BROKEN_JSON, str(broken))
    return Picture(entry.name, (entry.shard, *found[0]), classes)


def _entry_classes(entry: Entry) -> Classes:
    if "cls" in entry.files:
        return (_bytes(entry.shard, *entry.files["cls"]).decode("utf-8").strip(),)
    if "json" in entry.files:
        item = json.loads(_bytes(entry.shard, *entry.files["json"]))
        return _classes(item.get("label")) if isinstance(item, Mapping) else ()
    return ()


def _bytes(shard: Path, offset: int, size: int) -> bytes:
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)


# -- classes as numbers ------------------------------------------------------------------------


def class_names(found: Sequence[Found]) -> list[str]:
    """All classes in order: by number where all are numbers, else by name, as ImageFolder."""
    names = {name for one in found if isinstance(one, Picture) for name in one.classes}
    numbers = all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=lambda name: (int(name), name) if numbers else (0, name))


def numbered(found: Sequence[Found], names: Sequence[str]) -> tuple[list[Found], Array]:
    """The images, and their classes as numbers: int64 [images, most of one image], -1 for none.

    An image without a class becomes a BrokenSample. Raises DataError for a class not in `names`.
    """
    number = {name: i for i, name in enumerate(names)}
    used: list[Found] = []
    most = max((len(one.classes) for one in found if isinstance(one, Picture)), default=1)
    labels = np.full((len(found), max(most, 1)), -1, np.int64)
    for row, one in enumerate(found):
        if isinstance(one, Picture) and not one.classes:
            one = BrokenSample(one.name, NO_CLASS)
        used.append(one)
        for column, name in enumerate(one.classes if isinstance(one, Picture) else ()):
            if name not in number:
                raise DataError(
                    f"{used[row].name} is of class {name!r}, which is not among the classes that "
                    "are trained",
                    hint="held-out images must belong to classes of the training data",
                )
            labels[row, column] = number[name]
    return used, labels
