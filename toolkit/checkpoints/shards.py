"""Many tensors as safetensors files of bounded size: one file, or shards with an index.

File names and the index are Hugging Face's, so that every program that reads sharded checkpoints
reads these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgevlm.toolkit.checkpoints.safetensors_io import (
    STORAGE,
    Blocks,
    Entry,
    TensorSpec,
    Written,
    write_safetensors,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4_000_000_000


def nbytes_of(tensor: TensorSpec) -> int:
    """Bytes of a tensor in its file."""
    return Entry(tensor.dtype, tensor.shape, 0).elements * STORAGE[tensor.dtype].itemsize


def split(tensors: Sequence[TensorSpec], limit: int = SHARD_BYTES) -> dict[str, list[TensorSpec]]:
    """File names and their tensors, in order, each file at most `limit` bytes of tensors.

    A tensor that is larger than the limit has a file of its own.
    """
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + nbytes_of(tensor) > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes_of(tensor)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups)}


def write(
    folder: Path,
    files: Mapping[str, Sequence[TensorSpec]],
    produce: Callable[[TensorSpec], Blocks],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Written]:
    """Write the files of `split`, and their index if there are several; what was written.

    produce, metadata: as in write_safetensors. Raises CheckpointError where it does.
    """
    written = {
        name: write_safetensors(folder / name, tensors, produce, metadata)
        for name, tensors in files.items()
    }
    if set(files) != {SINGLE}:
        total = sum(nbytes_of(tensor) for tensors in files.values() for tensor in tensors)
        where = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return written
