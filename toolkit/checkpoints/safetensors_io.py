"""safetensors files, read and written one tensor at a time.

The safetensors package checks a file when it is opened. This file adds what a 7B model needs and
the package does not offer: byte offsets (ONNX external data points into these files), bfloat16
without torch, and writing a file whose tensors do not fit in memory together.
Format: 8 bytes little-endian header length, JSON header, the tensors' bytes without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.toolkit.checkpoints.inside import require_regular
from edgevlm.toolkit.errors import CheckpointError
from edgevlm.toolkit.ops.vocabulary import Array

FP8 = "fp8"
# safetensors name -> (our name, NumPy storage type); bfloat16 is stored as its upper 16 bits, FP8
# as the codes of float8.py
_TYPES = {
    "F64": ("fp64", "<f8"),
    "F32": ("fp32", "<f4"),
    "F16": ("fp16", "<f2"),
    "BF16": ("bf16", "<u2"),
    "I64": ("int64", "<i8"),
    "I32": ("int32", "<i4"),
    "I8": ("int8", "|i1"),
    "U8": ("uint8", "|u1"),
    "BOOL": ("bool", "|b1"),
    "F8_E4M3": (FP8, "|u1"),
}
STORAGE = {ours: np.dtype(numpy) for ours, numpy in _TYPES.values()}
_NAMES = {ours: theirs for theirs, (ours, _) in _TYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One stored tensor: `dtype` in our names, byte `offset` from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.elements * STORAGE[self.dtype].itemsize


class SafetensorsFile:
    """A file's table of contents; `read` gives one tensor. Raises CheckpointError if damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = _contents(path)

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self.entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.entries[key].shape

    def dtype(self, key: str) -> str:
        """In which dtype a tensor is stored, in our names."""
        return self.entries[key].dtype

    def read(self, key: str) -> Array:
        """One tensor, memory-mapped and read-only; bfloat16 is converted to float32, FP8 stays in
        codes.
        """
        entry = self.entries[key]
        mapped = np.memmap(self.path, STORAGE[entry.dtype], "r", entry.offset, entry.shape)
        array = np.asarray(mapped)
        return from_bfloat16(array) if entry.dtype == "bf16" else array


def _contents(path: Path) -> dict[str, Entry]:
    from safetensors import SafetensorError, safe_open

    try:
        require_regular(path)  # opening a pipe would wait for its other end
        with safe_open(path, framework="np"):
            pass  # the package checks header, overlaps, gaps and the file's length
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError, RecursionError, struct.error) as broken:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file: {broken}",
            hint="the download or copy was cut short; fetch this file again",
        ) from None
    header.pop("__metadata__", None)
    return {key: _entry(path, key, item, 8 + length) for key, item in header.items()}


def _entry(path: Path, key: str, item: dict[str, list[int]], base: int) -> Entry:
    stored = str(item["dtype"])
    if stored not in _TYPES:
        raise CheckpointError(f"{path}: {key} is stored as {stored}, which edgevlm does not read")
    return Entry(_TYPES[stored][0], tuple(item["shape"]), base + item["data_offsets"][0])


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """A finished file: the entry of each tensor, and the hash of all bytes."""

    entries: dict[str, Entry]
    sha256: str
    nbytes: int


Blocks = Iterable[Array]
BLOCK_BYTES = 1 << 26


def row_blocks(array: Array) -> Iterator[Array]:
    """Views of a tensor in blocks along its first axis, of about 64 MB each in float32."""
    if array.ndim < 2:
        yield array
        return
    rows = max(BLOCK_BYTES // max(4 * math.prod(array.shape[1:]), 1), 1)
    for start in range(0, array.shape[0], rows):
        yield array[start : start + rows]


def write_safetensors(
    path: Path,
    tensors: Sequence[TensorSpec],
    produce: Callable[[TensorSpec], Blocks],
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write `tensors` in an aligned order; `produce` makes them, one at a time.

    It yields a tensor in blocks along the first axis, which together have the stated shape; they
    are converted to the stated dtype. A second thread makes the next block while this one hashes
    and writes the last, so memory holds a few blocks and what `produce` itself holds. metadata:
    free text in the header; transformers asks for {"format": "pt"}. Raises CheckpointError where a
    value does not fit the dtype.
    """
    # Big tensors first: their sizes are multiples of the page or cache line, so they stay aligned.
    order = sorted(tensors, key=lambda t: (-_alignment(t), t.name))
    header, entries = _header(order, metadata)
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for data in _one_ahead(_encoded(order, produce)):
            digest.update(data)
            file.write(data)
        size = file.tell()
    return Written(entries, digest.hexdigest(), size)


def _encoded(
    order: Sequence[TensorSpec], produce: Callable[[TensorSpec], Blocks]
) -> Iterator[memoryview]:
    """The bytes of all tensors, block by block."""
    for tensor in order:
        rows = 0
        for block in produce(tensor):
            if block.shape[1:] != tensor.shape[1:] or block.ndim != len(tensor.shape):
                raise CheckpointError(
                    f"{tensor.name}: shape {block.shape}, expected {tensor.shape}",
                    hint="config.json and weights do not belong together",
                )
            rows += block.shape[0] if block.ndim else 1
            yield _bytes_of(block, tensor)
        if tensor.shape and rows != tensor.shape[0]:
            raise CheckpointError(
                f"{tensor.name}: {rows} rows, expected {tensor.shape}",
                hint="config.json and weights do not belong together",
            )


def _one_ahead(blocks: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same blocks, each made in another thread while the one before is being used."""
    with ThreadPoolExecutor(1) as pool:
        pending: Future[memoryview | None] = pool.submit(next, blocks, None)
        while (ready := pending.result()) is not None:
            pending = pool.submit(next, blocks, None)
            yield ready


def _alignment(tensor: TensorSpec) -> int:
    size = math.prod(tensor.shape) * STORAGE[tensor.dtype].itemsize
    return math.gcd(size, 4096)


def _header(
    order: Sequence[TensorSpec], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, Entry]]:
    spans, offset = {}, 0
    for t in order:
        entry = Entry(t.dtype, t.shape, offset)
        spans[t.name] = entry
        offset += entry.nbytes
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    table |= {
        name: {
            "dtype": _NAMES[e.dtype],
            "shape": list(e.shape),
            "data_offsets": [e.offset, e.offset + e.nbytes],
        }
        for name, e in spans.items()
    }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 4096)  # tensors start on a page, so that they can be mapped
    base = 8 + len(text)
    entries = {n: Entry(e.dtype, e.shape, base + e.offset) for n, e in spans.items()}
    return struct.pack("<Q", len(text)) + text, entries


def _bytes_of(array: Array, tensor: TensorSpec) -> memoryview:
    if tensor.dtype == FP8 and array.dtype != STORAGE[FP8]:
        raise AssertionError(f"{tensor.name}: FP8 is written from codes, not from {array.dtype}")
    if tensor.dtype == "bf16":
        array = to_bfloat16(array)
    elif array.dtype != STORAGE[tensor.dtype]:
        array = _cast(array, tensor)
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data


def _cast(array: Array, tensor: TensorSpec) -> Array:
    kind = STORAGE[tensor.dtype]
    extremes = _extremes(array)
    if kind.kind == "f" and not np.isfinite(extremes).all():
        extremes = _extremes(array[np.isfinite(array)])  # infinities and NaN are kept
    with np.errstate(over="ignore"):
        if not _fit(extremes, kind):
            raise CheckpointError(
                f"{tensor.name} holds {extremes[np.abs(extremes).argmax()]:.6g}, "
                f"which does not fit {tensor.dtype}",
                hint="export with --dtype bf16 or --dtype fp32",
            )
        return array.astype(kind)


def _extremes(array: Array) -> Array:
    return np.asarray([array.min(), array.max()]) if array.size else np.zeros(2)


def _fit(extremes: Array, kind: np.dtype[Any]) -> bool:
    if kind.kind == "f":
        return bool(np.isfinite(extremes.astype(kind)).all())
    low, high = (0, 1) if kind.kind == "b" else (np.iinfo(kind).min, np.iinfo(kind).max)
    return bool(low <= extremes[0] and extremes[1] <= high)


def to_bfloat16(array: Array) -> Array:
    """The upper 16 bits of each float32, rounded half to even, as uint16."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    """The float32 values of stored bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
