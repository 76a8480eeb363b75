"""What a calibration has found so far, kept beside its output until that is written.

`.NAME.calibrating` beside the bundle NAME (on a mounted disk, `.calibrating` in it) holds a
safetensors file per thing found, each written whole, and `key`, a hash of all that the result
depends on: bundle, samples, settings, versions of what computes. The same command goes on with it;
for any other it is thrown away. A writer holds a lock there (toolkit/bundle/unfinished.py), in a
file that says that the folder is ours. Each file has a checksum: what was damaged is found again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgevlm.toolkit.bundle.atomic import output_error
from edgevlm.toolkit.bundle.publish import CALIBRATING, must_be_kept
from edgevlm.toolkit.bundle.unfinished import try_lock
from edgevlm.toolkit.checkpoints.safetensors_io import (
    STORAGE,
    SafetensorsFile,
    TensorSpec,
    row_blocks,
    write_safetensors,
)
from edgevlm.toolkit.errors import CheckpointError, OutputError, ToolkitError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.strict import to_plain

FORMAT = 4  # of what is kept; another one is thrown away
_SECONDS = 5.0  # between two times that a pass over samples is kept
_KEY, _LOCK, _DONE, _CHECKSUM = "key", "lock", "done", "crc32"
_MARK = "an unfinished calibration of edgevlm; while it runs it holds a lock on this file\n"
_OURS = re.compile(rf"{_KEY}|{_LOCK}|.*\.safetensors|.*\.part")
_DTYPES = {dtype: name for name, dtype in STORAGE.items() if name not in ("bf16", "fp8")}


class Found(Protocol):
    """Sums over samples that can be kept and taken up again."""

    def arrays(self) -> dict[str, Array]:
        """All of it; no array is empty."""
        ...

    def fill(self, arrays: Mapping[str, Array]) -> None:
        """The inverse, on a new one."""
        ...


class Unfinished:
    """A folder with what was found; without one nothing is kept.

    made_by: the program. part: what the names of all that is kept begin with.
    """

    def __init__(self, folder: Path | None = None, made_by: str = "", part: str = "") -> None:
        self.folder = folder
        self._made_by = made_by
        self._part = part
        self._kept_at = time.monotonic()
        self._descriptor: int | None = None
        self._whole: set[str] = set()  # what was compared with its checksum, or written here
        self._say: Callable[[str], None] = _silent

    def begin(self, progress: Callable[[str], None], *parts: Any) -> None:
        """Take the folder: what it holds is kept if it was found by the same program, versions of
        NumPy included, for the same `parts`: all that the calibration depends on.

        Raises OutputError if another process is at work there, or somebody else's files are.
        """
        self._say = progress
        if self.folder is None:
            return
        plain = to_plain([FORMAT, self._made_by, np.__version__, *parts])
        key = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
        old = self.folder / _KEY
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        if old.exists() and old.read_bytes() == key.encode():
            progress("going on where an earlier run of this calibration ended")
            return
        for file in self.folder.iterdir():
            if file.name != _LOCK:
                file.unlink()
        old.write_text(key)

    def part(self, name: str) -> Unfinished:
        """A part of the folder that can be dropped by itself; the whole is begun and closed."""
        part = Unfinished(self.folder, self._made_by, f"{self._part}{name} ")
        part._say = self._say
        return part

    def drop(self) -> None:
        """Remove all that a part holds."""
        assert self._part
        if self.folder is not None:
            for file in self.folder.iterdir():
                if file.name.startswith(self._part):
                    file.unlink()

    def get(self, name: str) -> dict[str, Array]:
        """The arrays kept under a name, mapped from the file. Raises CheckpointError for damage."""
        file = SafetensorsFile(self._file(name))
        arrays = {key: file.read(key) for key in file.entries}
        stated = arrays.pop(_CHECKSUM, None)
        if name not in self._whole:
            if stated is None or stated.tolist() != [_checksum(arrays)]:
                raise CheckpointError(f"{file.path} is damaged (its CRC-32 differs)")
            self._whole.add(name)
        return arrays

    def has(self, name: str) -> bool:
        """Whether something is kept under a name. What is damaged is told, and removed."""
        if self.folder is None or not self._file(name).exists():
            return False
        if name not in self._whole:
            try:
                self.get(name)
            except CheckpointError as damaged:
                self._say(f"{damaged.message}; it is computed again")
                self._file(name).unlink()
                return False
        return True

    def put(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Keep arrays, none of them empty, under a name."""
        if self.folder is None:
            return
        arrays = {**arrays, _CHECKSUM: np.array([_checksum(arrays)], np.int64)}
        specs = [TensorSpec(key, _DTYPES[x.dtype], x.shape) for key, x in arrays.items()]
        part = self._file(name).with_suffix(".part")
        write_safetensors(part, specs, lambda spec: row_blocks(arrays[spec.name]))
        os.replace(part, self._file(name))
        self._whole.add(name)
        self._kept_at = time.monotonic()

    def take_up(self, name: str, found: Found) -> int:
        """Fill `found` with what an earlier run kept; how many samples that was of.

        Raises CheckpointError where that was something else, or is damaged.
        """
        if not self.has(name):
            return 0
        arrays = self.get(name)
        try:
            done = int(arrays.pop(_DONE)[0])
            found.fill(arrays)
        except (LookupError, TypeError, ValueError) as odd:
            raise CheckpointError(
                f"{self._file(name)} holds something else ({odd})", hint="run the command again"
            ) from None
        return done

    def keep(self, name: str, found: Found, done: int, *, last: bool) -> None:
        """Keep what was found in the first `done` samples, if it is the last time or long ago."""
        if last or self.due():
            self.put(name, {**found.arrays(), _DONE: np.array([done], np.int64)})

    def due(self) -> bool:
        """Whether nothing was kept for a while."""
        return time.monotonic() - self._kept_at >= _SECONDS

    def close(self, *, remove: bool) -> None:
        """Let go of the folder. remove: with all that it holds."""
        if self._descriptor is None or self.folder is None:
            return
        if remove:
            self._remove()
        os.close(self._descriptor)
        self._descriptor = None

    def _remove(self) -> None:
        """All that is ours, the lock last; what somebody else put there stays."""
        assert self.folder is not None
        with suppress(OSError):
            for file in sorted(self.folder.iterdir(), key=lambda file: file.name == _LOCK):
                if _OURS.fullmatch(file.name):
                    file.unlink()
            self.folder.rmdir()

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._part}{name}.safetensors"

    def _lock(self) -> None:
        assert self.folder is not None
        names = {file.name for file in self.folder.iterdir()}
        lock = self.folder / _LOCK
        marked = lock.is_file() and lock.read_bytes() in (_MARK.encode(), b"")
        if names and not (marked and all(map(_OURS.fullmatch, names))):
            raise OutputError(
                f"{self.folder} holds what we did not write, and is left alone",
                hint="move it away, or write to another place",
            )
        descriptor = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        if try_lock(descriptor) is False:
            os.close(descriptor)
            raise OutputError(
                f"{self.folder} belongs to a calibration that is running",
                hint="wait for it, or write to another place",
            )
        self._descriptor = descriptor
        if not os.fstat(descriptor).st_size:
            os.write(descriptor, _MARK.encode())


def _checksum(arrays: Mapping[str, Array]) -> int:
    """Of all arrays by name, in one number."""
    value = 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        value = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), value)
        value = zlib.crc32(array.reshape(-1).view(np.uint8).data, value)
    return value


def _silent(message: str) -> None:
    return None


@contextmanager
def beside(out: Path, made_by: str) -> Iterator[Unfinished]:
    """What an unfinished calibration of `out` has found; removed when the block ends well.

    It stays where the block is interrupted, or `out` cannot be written; where the calibration is
    refused it would be refused again, and nothing stays.
    """
    final = out.resolve()
    parents = [parent for parent in final.parents if not parent.exists()]
    folder = final.with_name(f".{final.name}{CALIBRATING}")
    kept = Unfinished(final / CALIBRATING if must_be_kept(final) else folder, made_by)
    remove = False
    try:
        yield kept
        remove = True
    except OutputError:
        raise
    except ToolkitError:
        remove = True
        raise
    except OSError as refused:
        raise output_error(refused, out) from None
    finally:
        kept.close(remove=remove)
        with suppress(OSError):  # one that holds something stays
            for parent in parents:
                parent.rmdir()
