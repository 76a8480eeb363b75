"""WebDataset shards: tar files in which the files of a sample follow one another and share a name.

Shards are read one after another, and only the headers of a tar are read to find its samples, so a
set may be larger than the disk cache and the memory. Python's own tarfile is used and not the
package webdataset: a resumed run must begin at the very sample, and every process must see the
same order, however many there are. Both need the places of the samples in the files, and samples
that can be skipped without being read; webdataset hands out decoded samples, and gives whole shards
to processes, whose numbers of samples then differ.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevlm.toolkit.errors import DataError
from edgevlm.training.data.broken import BROKEN_JSON, DAMAGED_SHARD, STRUCTURE, BrokenSample
from edgevlm.training.data.samples import RawSample, captioned, read_item
from edgevlm.training.data.sampling import Shuffle, permutation

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BLOCK = 512


@dataclass(frozen=True)
class Entry:
    """A sample's place: its shard, its key there, and offset and size of each file by extension."""

    shard: Path
    key: str
    files: Mapping[str, tuple[int, int]]

    @property
    def name(self) -> str:
        """The shard and the key."""
        return f"{self.shard.name}:{self.key}"


def shards(path: Path) -> list[Path]:
    """The shards at a path: a tar, a folder of them, or a name such as part-{000..099}.tar.

    Raises DataError if one is missing or there are none.
    """
    found = sorted(path.glob("*.tar")) if path.is_dir() else _expanded(path)
    missing = [shard for shard in found if not shard.exists()]
    if missing or not found:
        shown = missing[0] if missing else path / "*.tar"
        raise DataError(f"{shown} does not exist", hint="shards are tar files, not compressed")
    return found


def _expanded(path: Path) -> list[Path]:
    match = _BRACES.search(path.name)
    if match is None:
        return [path]
    first, last, width = int(match[1]), int(match[2]), len(match[1])
    names = [
        f"{path.name[: match.start()]}{number:0{width}}{path.name[match.end() :]}"
        for number in range(first, last + 1)
    ]
    return [path.with_name(name) for name in names]


class TarSamples:
    """A stream of samples in shards; the order is the same for any number of processes.

    window: so many samples are known ahead, and the next one is drawn from them; 1 for no shuffle
    within shards.
    """

    def __init__(self, paths: Sequence[Path], *, window: int = 2000) -> None:
        self.paths = tuple(paths)
        self._window = window

    def stream(self, shuffle: Shuffle | None, start: int = 0) -> Iterator[Entry | BrokenSample]:
        """The samples of one epoch from number `start` on, in order if shuffle is None.

        A damaged shard gives a BrokenSample where it breaks off; what is before it is used.
        """
        for number, entry in enumerate(self._epoch(shuffle)):
            if number >= start:
                yield entry

    def count(self) -> int:
        """Number of samples, by reading the headers of all shards."""
        return sum(1 for path in self.paths for _ in entries(path))

    def _epoch(self, shuffle: Shuffle | None) -> Iterator[Entry | BrokenSample]:
        if shuffle is None:
            for path in self.paths:
                yield from entries(path)
            return
        order = permutation(len(self.paths), shuffle)
        ahead: list[Entry | BrokenSample] = []
        draws = _draws(shuffle)
        for number in order.tolist():
            for entry in entries(self.paths[number]):
                ahead.append(entry)
                if len(ahead) >= self._window:
                    yield _drawn(ahead, next(draws))
        while ahead:
            yield _drawn(ahead, next(draws))


def _drawn(ahead: list[Entry | BrokenSample], draw: int) -> Entry | BrokenSample:
    """Take one out; the last takes its place."""
    at = draw % len(ahead)
    ahead[at], ahead[-1] = ahead[-1], ahead[at]
    return ahead.pop()


def _draws(shuffle: Shuffle) -> Iterator[int]:
    bits = shuffle.bits(1)
    while True:
        yield from bits.random_raw(1024).tolist()


def entries(shard: Path) -> Iterator[Entry | BrokenSample]:
    """The samples of one shard, by its headers. A damaged one ends with a BrokenSample."""
    key, files = "", dict[str, tuple[int, int]]()
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                vars(tar)["members"] = []  # tarfile keeps all headers otherwise
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                if not member.isfile() or not stem:
                    continue
                if (own := f"{folder}/{stem}" if folder else stem) != key:
                    if files:
                        yield Entry(shard, key, files)
                    key, files = own, {}
                files[extension.lower()] = (member.offset_data, member.size)
        _check_end(shard, end)
    except (tarfile.TarError, OSError) as broken:
        yield BrokenSample(shard.name, DAMAGED_SHARD, f"after {key or 'its beginning'}: {broken}")
        return
    if files:
        yield Entry(shard, key, files)


def _check_end(shard: Path, end: int) -> None:
    """tarfile takes a header that it cannot read for the end; a true end is empty or zeros."""
    with shard.open("rb") as file:
        file.seek(end)
        if any(file.read(_BLOCK)):
            raise tarfile.ReadError("a header cannot be read")


def read(entry: Entry) -> RawSample:
    """The files of an entry. A caption (txt) counts where the json has no conversation.

    Raises BrokenSample.
    """
    try:
        with entry.shard.open("rb") as file:
            content = {}
            for extension, (offset, size) in entry.files.items():
                file.seek(offset)
                content[extension] = file.read(size)
    except OSError as refused:
        raise BrokenSample(entry.name, DAMAGED_SHARD, str(refused.strerror)) from None
    images = tuple(data for extension, data in content.items() if _is_image(extension))
    item = _json(entry, content["json"]) if "json" in content else {}
    if "conversations" not in item and "messages" not in item and "txt" in content:
        if len(images) != 1:
            raise BrokenSample(entry.name, STRUCTURE, f"a caption with {len(images)} images")
        text = content["txt"].decode("utf-8", "replace").strip()
        return captioned(entry.name, images[0], text)
    stated = {key: value for key, value in item.items() if key not in ("image", "images")}
    raw = read_item(stated, entry.name, entry.shard.parent)
    return RawSample(raw.name, images, raw.turns)


def _is_image(extension: str) -> bool:
    """Also of one of several: key.0.jpg, key.1.jpg."""
    return extension.rpartition(".")[2] in IMAGES


def _json(entry: Entry, text: bytes) -> Mapping[str, object]:
    try:
        item = json.loads(text)
    except (ValueError, RecursionError) as broken:
        raise BrokenSample(entry.name, BROKEN_JSON, str(broken)) from None
    if isinstance(item, list):  # the conversation alone
        return {"conversations": item}
    if not isinstance(item, dict):
        raise BrokenSample(entry.name, STRUCTURE, "the json holds no object")
    return item
