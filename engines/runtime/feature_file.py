"""Embeddings on disk: written as they come, gone on with after a kill, then one .npz or .parquet.

`.NAME.embedding` beside the file NAME holds, until that is whole: `vectors` (float32 rows), `done`
(a line of JSON for each batch: files read, rows written, what was bad) and `key`, a hash of all
that the result depends on. The same command goes on with it; any other one starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgevlm.toolkit.bundle.atomic import output_error
from edgevlm.toolkit.bundle.unfinished import try_lock
from edgevlm.toolkit.errors import ConfigError, MissingExtra, OutputError
from edgevlm.toolkit.ops.vocabulary import Array

SUFFIXES = (".npz", ".parquet")
_KEY, _DONE, _VECTORS, _LOCK = "key", "done", "vectors", "lock"
_ROWS = 4096  # that are converted at a time


@dataclass
class Unfinished:
    """What earlier runs and this one have found: files read, rows written, bad files by reason."""

    folder: Path
    channels: int
    read: int = 0
    rows: int = 0
    bad: dict[str, str] = field(default_factory=dict)

    def add(self, files: int, vectors: Array, bad: dict[str, str]) -> None:
        """Keep the rows [N, channels] of the next `files` files, those in `bad` left out."""
        with (self.folder / _VECTORS).open("ab") as rows:
            rows.write(np.ascontiguousarray(vectors, np.float32).tobytes())
        line = json.dumps({"files": files, "rows": len(vectors), "bad": bad})
        with (self.folder / _DONE).open("a", encoding="ascii") as done:
            done.write(line + "\n")
        self._count(files, len(vectors), bad)

    def _count(self, files: int, rows: int, bad: dict[str, str]) -> None:
        self.read += files
        self.rows += rows
        self.bad |= bad

    def restore(self) -> None:
        """Take up what the folder holds; rows of a batch that was not finished are cut off."""
        done = self.folder / _DONE
        whole = 0
        for line in done.read_bytes().splitlines(keepends=True) if done.exists() else []:
            if not line.endswith(b"\n"):
                break
            entry = json.loads(line)
            self._count(entry["files"], entry["rows"], entry["bad"])
            whole += len(line)
        if done.exists():
            os.truncate(done, whole)
        (self.folder / _VECTORS).touch()
        os.truncate(self.folder / _VECTORS, 4 * self.rows * self.channels)

    def write(self, out: Path, files: Sequence[str]) -> None:
        """Write the file `out`, whole or not at all. files: all that were read, good and bad."""
        good = [file for file in files if file not in self.bad]
        part = out.with_name(f".{out.name}.part")
        try:
            with part.open("wb") as stream:
                save = _parquet if out.suffix == ".parquet" else _npz
                save(stream, self.folder / _VECTORS, good, self.channels)
            os.replace(part, out)
        finally:
            part.unlink(missing_ok=True)


def check_output(out: Path, *, force: bool) -> None:
    """Raise ConfigError, OutputError or MissingExtra before any work."""
    if out.suffix not in SUFFIXES:
        raise ConfigError(
            f"-o {out}: the name ends with none of {', '.join(SUFFIXES)}",
            hint="a .npz is read by numpy.load",
        )
    if out.is_dir() or (out.exists() and not force):
        raise OutputError(f"{out} exists", hint="add --force to replace it")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {out.absolute().parent}", hint="make it first")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise MissingExtra("pyarrow", "parquet", purpose=f"writing {out.name}")


@contextmanager
def beside(out: Path, channels: int, *depends: Any) -> Iterator[Unfinished]:
    """What is kept beside `out`, removed when the block ends well.

    depends: all that the rows depend on, as values for JSON. Raises OutputError where it cannot be
    written, or where another process is at work.
    """
    folder = out.absolute().with_name(f".{out.name}.embedding")
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            if try_lock(descriptor) is False:
                raise OutputError(f"{out} is being written by another process")
            kept = folder / _KEY
            if not kept.exists() or kept.read_text() != key:
                for name in (_KEY, _DONE, _VECTORS):
                    (folder / name).unlink(missing_ok=True)
                kept.write_text(key)
            found = Unfinished(folder, channels)
            found.restore()
            yield found
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
    except OSError as refused:
        raise output_error(refused, out) from None


def _npz(stream: BinaryIO, vectors: Path, files: Sequence[str], channels: int) -> None:
    shape = {"descr": "<f4", "fortran_order": False, "shape": (len(files), channels)}
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as whole:
        with whole.open("embeddings.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, shape)
            with vectors.open("rb") as rows:
                shutil.copyfileobj(rows, entry, 1 << 22)
        with whole.open("files.npy", "w", force_zip64=True) as entry:
            names = np.asarray(files, str) if files else np.zeros(0, "U1")
            np.lib.format.write_array(entry, names, allow_pickle=False)


def _parquet(stream: BinaryIO, vectors: Path, files: Sequence[str], channels: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("file", pa.string()), ("embedding", pa.list_(pa.float32(), channels))])
    rows: Array = np.memmap(vectors, np.float32, "r", shape=(len(files), channels))
    with pq.ParquetWriter(stream, schema) as writer:
        for start in range(0, len(files), _ROWS):
            piece = np.ascontiguousarray(rows[start : start + _ROWS])
            values = pa.FixedSizeListArray.from_arrays(pa.array(piece.reshape(-1)), channels)
            names = pa.array(files[start : start + _ROWS], pa.string())
            writer.write_table(pa.table([names, values], schema=schema))
