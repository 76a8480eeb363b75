"""LLaVA's JSON: a list of samples, or one sample a line, with a folder of images.

Such a file can have gigabytes. Only the place of each sample in it is kept: 16 bytes a sample
instead of the kilobytes that Python's objects take, and nothing that worker processes would copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgevlm.toolkit.errors import DataError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.training.data.broken import BROKEN_JSON, BrokenSample
from edgevlm.training.data.samples import RawSample, read_item

_CHUNK_BYTES = 32 << 20
_BLANKS = re.compile(r"[ \t\r\n]*")
_MARK = b"\xef\xbb\xbf"  # a byte order mark, which some editors write


class JsonSamples:
    """The samples of one file; `folder` is where relative image paths begin.

    Raises DataError if the file cannot be read or is no list. A broken line raises BrokenSample
    when it is read.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._folder = folder
        self._spans = _spans(path)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._spans)

    def __getitem__(self, index: int) -> RawSample:
        """The sample at `index`. Raises BrokenSample."""
        start, end = self._spans[index].tolist()
        name = f"{self._path.name}[{index}]"
        with self._path.open("rb") as file:
            file.seek(start)
            text = file.read(end - start)
        try:
            item = json.loads(text)
        except (ValueError, RecursionError) as broken:
            raise BrokenSample(name, BROKEN_JSON, str(broken)) from None
        if isinstance(item, dict) and isinstance(item.get("id"), (str, int)):
            name = f"{name} id {item['id']}"
        return read_item(item, name, self._folder)


def _spans(path: Path) -> Array:
    """Where each sample begins and ends in the file: int64 [samples, 2], in bytes."""
    try:
        with path.open("rb") as file:
            start = 3 if file.read(3) == _MARK else 0
            file.seek(start)
            first = _first(file)
            file.seek(start)
            spans = list(_of_list(file, path) if first == "[" else _of_lines(file))
    except OSError as refused:
        raise DataError(f"{path} cannot be read: {refused.strerror}") from None
    if first not in ("[", "{"):
        raise DataError(f"{path} is neither a JSON list nor lines of JSON objects")
    return np.array(spans, np.int64).reshape(-1, 2)


def _first(file: BinaryIO) -> str:
    """The first character that is no blank; "" if there is none."""
    while chunk := file.read(4096):
        text = chunk.decode("latin-1").lstrip()
        if text:
            return text[0]
    return ""


def _of_lines(file: BinaryIO) -> Iterator[tuple[int, int]]:
    at = file.tell()
    for line in file:
        if line.strip():
            yield at, at + len(line)
        at += len(line)


class _Window:
    """A part of a file as text of one character a byte, so that positions are bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.before = file.tell()  # bytes before the window
        self.text = ""
        self.at = 0

    def grow(self) -> bool:
        """Drop what is before `at`, and read on. At the end of the file nothing changes: False."""
        chunk = self._file.read(_CHUNK_BYTES)
        if not chunk:
            return False
        self.before += self.at
        self.text = self.text[self.at :] + chunk.decode("latin-1")
        self.at = 0
        return True

    def next(self) -> str:
        """Go to the next character that is no blank, and give it; "" at the end."""
        while True:
            found = _BLANKS.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""


def _of_list(file: BinaryIO, path: Path) -> Iterator[tuple[int, int]]:
    """The items of a JSON list. The decoder finds their ends; its objects are dropped at once."""
    window = _Window(file)
    window.next()
    window.at += 1
    if window.next() == "]":
        return _check_end(window, path)
    while True:
        window.next()
        end = _end_of_item(window, path)
        yield window.before + window.at, window.before + end
        window.at = end
        follows = window.next()
        if follows == "]":
            return _check_end(window, path)
        if follows != ",":
            raise _broken(window, path, "expected a comma or the end of the list")
        window.at += 1


def _check_end(window: _Window, path: Path) -> None:
    window.at += 1
    if window.next():
        raise _broken(window, path, "there is something after the list")


def _end_of_item(window: _Window, path: Path) -> int:
    decoder = json.JSONDecoder()
    while True:
        try:
            end = decoder.raw_decode(window.text, window.at)[1]
            if end < len(window.text) or not window.grow():
                return end
        except (ValueError, RecursionError) as broken:  # also an item that the window cuts
            if not window.grow():
                reason = getattr(broken, "msg", str(broken))
                raise _broken(window, path, reason, getattr(broken, "pos", window.at)) from None


def _broken(window: _Window, path: Path, reason: str, at: int | None = None) -> DataError:
    place = window.before + (window.at if at is None else at)
    return DataError(
        f"{path} is not valid JSON at byte {place}: {reason}",
        hint="in a file with one sample a line (.jsonl), a broken line is skipped and counted",
    )
