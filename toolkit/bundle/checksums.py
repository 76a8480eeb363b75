"""Checksums that can be compared whenever a file is opened: CRC-32 of pieces.

They find damage: any changed bit, and pieces that never arrived. Against somebody who changes a
file on purpose only SHA-256 helps, which takes longer; docs/performance.md has both figures.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE_BYTES = 1 << 26
_READ_BYTES = 1 << 20

Checksums = Mapping[str, tuple[str, ...]]  # by file: 8 hexadecimal digits for each piece


def of_files(folder: Path, names: Iterable[str], threads: int = 0) -> dict[str, tuple[str, ...]]:
    """The checksums of files in a folder. threads: for the pieces; 0 for one per processor."""
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        jobs = {
            name: [
                pool.submit(_piece, folder / name, start)
                for start in range(0, max((folder / name).stat().st_size, 1), PIECE_BYTES)
            ]
            for name in names
        }
        return {name: tuple(job.result() for job in pieces) for name, pieces in jobs.items()}


def _piece(path: Path, start: int) -> str:
    """The checksum of at most PIECE_BYTES from `start` on."""
    buffer = memoryview(bytearray(_READ_BYTES))
    left, value = PIECE_BYTES, 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[: min(left, _READ_BYTES)])):
            value = zlib.crc32(buffer[:count], value)
            left -= count
    return f"{value:08x}"
