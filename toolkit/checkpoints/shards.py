"""Many tensors as weight files of bounded size: one file, or shards with an index.

File names and the index are Hugging Face's, so that every program that reads sharded checkpoints
reads these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from edgevlm.toolkit.checkpoints import inside
from edgevlm.toolkit.checkpoints.inside import is_plain
from edgevlm.toolkit.checkpoints.safetensors_io import (
    STORAGE,
    Blocks,
    Entry,
    TensorSpec,
    Written,
    write_safetensors,
)
from edgevlm.toolkit.errors import CheckpointError
from edgevlm.toolkit.strict import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4_000_000_000
FETCH = "the download or copy is incomplete; fetch the checkpoint again"


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


# -- reading -----------------------------------------------------------------------------------


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The weight files of a folder: `stem` alone, or those that its index names; [] for neither.

    Raises CheckpointError for an index that names others than files of the folder.
    """
    index = folder / f"{stem}.index.json"
    if (folder / stem).exists():  # before an index, as transformers looks for them
        return [folder / stem]
    if not index.exists():
        return []
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        fault = inside.fault(folder, name)
        if fault:
            raise CheckpointError(f"{index}: {folder} {fault}", hint=FETCH)
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    """From tensors to files. Raises CheckpointError for an index that does not say."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files", hint=FETCH)
    missing = sorted(
        n for n in set(files.values()) if is_plain(n) and not (index.parent / n).exists()
    )
    if missing:
        named = f"{', '.join(missing[:3])}{f' and {len(missing) - 3} more' if missing[3:] else ''}"
        raise CheckpointError(f"{index} names files that do not exist: {named}", hint=FETCH)
    return files


def check_map(folder: Path, stem: str, tensors: Mapping[str, Iterable[str]]) -> None:
    """Raise CheckpointError unless each tensor is in the shard that the index names.

    tensors: their names, by shard.
    """
    index = folder / f"{stem}.index.json"
    stated = _weight_map(index)
    found = {key: name for name, keys in tensors.items() for key in keys}
    wrong = sorted(key for key in {*stated, *found} if stated.get(key) != found.get(key))
    if wrong:
        key = wrong[0]
        where = f"is in {found[key]}" if key in found else f"is not in {stated[key]}"
        says = f"names {stated[key]} for it" if key in stated else "does not name it"
        raise CheckpointError(
            f"{index} is not of these shards: {key:.200} {where}, and the index {says}"
            + (f" ({len(wrong)} such tensors)" if wrong[1:] else ""),
            hint=FETCH,
        )
