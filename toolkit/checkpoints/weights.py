"""Weights as lazy mappings: each tensor is read, or made, when it is used.

`Recipes` applies a table of recipes (toolkit/models/recipes.py) to a checkpoint; `RandomWeights`
makes the weights of a preset. Neither holds more than one tensor at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, cast

import numpy as np

from edgevlm.toolkit.checkpoints import shards
from edgevlm.toolkit.checkpoints.safetensors_io import (
    BLOCK_BYTES,
    FP8,
    STORAGE,
    SafetensorsFile,
    row_blocks,
)
from edgevlm.toolkit.checkpoints.shards import FETCH
from edgevlm.toolkit.errors import CheckpointError
from edgevlm.toolkit.models.recipes import Recipe, same, transposed
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.blockwise import StorageFormat
from edgevlm.toolkit.quantization.coded import Codes, Offers

Shapes = Mapping[str, tuple[int, ...]]
FLOAT_WEIGHTS = (
    "take the float checkpoint that it was made from; edgevlm build --precision int4 (or int8) "
    "quantizes it"
)


class TensorSource(Protocol):
    """Stored tensors by name."""

    def keys(self) -> Iterable[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def read(self, key: str) -> Array: ...


TorchReader = Callable[[Path], TensorSource]


class Checkpoint:
    """The tensors of a folder (one file, or shards with an index) or of one file.

    packed: the tensors whose codes are known, and how a bundle stores them (packed.py). idle:
    tensors that change nothing if nobody reads them.
    """

    def __init__(
        self,
        sources: Mapping[str, TensorSource],
        where: str,
        packed: Mapping[str, StorageFormat] = MappingProxyType({}),
        idle: tuple[str, ...] = (),
    ) -> None:
        self._sources = sources
        self.where = where
        self.packed = packed
        self.idle = idle

    def keys(self) -> list[str]:
        """All tensor names."""
        return list(self._sources)

    def __contains__(self, key: str) -> bool:
        return key in self._sources

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._sources[key].shape(key)

    def read(self, key: str) -> Array:
        """One tensor."""
        return self._sources[key].read(key)

    def source(self, key: str) -> TensorSource:
        """What one tensor is read from."""
        return self._sources[key]

    def codes(self, key: str) -> Codes | None:
        """The codes of a packed tensor; None for any other."""
        source = self._sources[key]
        return source.codes(key) if isinstance(source, Offers) else None

    def dtype(self, key: str) -> str:
        """In which dtype one tensor is stored, in our names."""
        stated = getattr(self._sources[key], "dtype", None)
        if stated is not None:
            return str(stated(key))
        kind = self.read(key).dtype
        return next(name for name, stored in STORAGE.items() if stored == kind)

    def file(self, key: str) -> Path | None:
        """The file that holds one tensor; None for a tensor that is computed from several."""
        path: Path | None = getattr(self._sources[key], "path", None)
        return path


LFS = b"version https://git-lfs.github.com/spec/v1"


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError if a file is the pointer that a clone without git-lfs leaves."""
    if not path.is_file() or path.stat().st_size > 1024:
        return
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes) is a Git LFS pointer, not the file itself",
                hint=f"git -C {path.parent} lfs pull   (git-lfs must be installed)",
            )


def has_weights(folder: Path) -> bool:
    """Whether a folder has the weight files of a model, or an index of them."""
    stems = ("model.safetensors", "pytorch_model.bin")
    return any((folder / (stem + end)).exists() for stem in stems for end in ("", ".index.json"))


def open_file(path: Path, torch_reader: TorchReader | None) -> TensorSource:
    """The tensors of one file, safetensors or torch. Raises CheckpointError."""
    refuse_pointer(path)
    if path.suffix == ".safetensors":
        return _floats(path)
    if torch_reader is None:
        raise CheckpointError(
            f"{path} is a torch file; reading it needs torch", hint="pip install 'edgevlm[train]'"
        )
    return torch_reader(path)


def _floats(path: Path) -> SafetensorsFile:
    """A file of a checkpoint. Raises CheckpointError for FP8, whose scales every program names and
    shapes as it likes: codes alone are not the weights.
    """
    file = SafetensorsFile(path)
    coded = next((key for key, entry in file.entries.items() if entry.dtype == FP8), None)
    if coded is not None:
        raise CheckpointError(
            f"{path}: {coded} is stored as F8_E4M3, which edgevlm does not read",
            hint="take the checkpoint in float; edgevlm calibrate --to fp8 makes FP8 of it",
        )
    return file


def open_checkpoint(folder: Path, torch_reader: TorchReader | None = None) -> Checkpoint:
    """The weights in `folder`: safetensors first, else torch files through `torch_reader`.

    Raises CheckpointError if there are none, a shard is missing, or only torch files exist and
    no reader for them was passed in; ConfigError if the index of the shards is no JSON object.
    """
    for stem, read in (("model.safetensors", _floats), ("pytorch_model.bin", torch_reader)):
        files = shards.weight_files(folder, stem)
        if not files:
            continue
        if read is None:
            raise CheckpointError(
                f"{folder} holds torch files only ({files[0].name}); reading them needs torch",
                hint="pip install 'edgevlm[train]'",
            )
        for file in files:
            refuse_pointer(file)
        opened = {file.name: read(file) for file in files}
        joined = _join(folder, list(opened.values()))
        if stem not in opened:
            shards.check_map(folder, stem, {name: x.keys() for name, x in opened.items()})
        return joined
    raise _no_weights(folder)


def _no_weights(folder: Path) -> CheckpointError:
    """The error for a folder without weight files, naming what it has in their place."""
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    steps = [name for name in found if name.startswith("global_step")]
    if steps or "zero_to_fp32.py" in found:
        return CheckpointError(
            f"{folder} holds DeepSpeed's partitions ({', '.join(steps[:3])}), not whole weights",
            hint=f"cd {folder} && python zero_to_fp32.py . pytorch_model.bin",
        )
    foreign = [name for name in found if name.endswith((".gguf", ".pth", ".msgpack", ".h5"))]
    if foreign:
        return CheckpointError(
            f"{folder} holds weights in a format that edgevlm does not read: {foreign[0]}",
            hint="take the checkpoint as safetensors",
        )
    parts = [name for name in found if name.endswith((".safetensors", ".bin"))]
    if any("-of-" in name for name in parts):
        return CheckpointError(
            f"{folder} holds shards ({parts[0]}) without their index ({_index_of(parts[0])})",
            hint=FETCH,
        )
    return CheckpointError(
        f"{folder} holds no weights (model.safetensors, pytorch_model.bin or shards of them)",
        hint=FETCH,
    )


def _index_of(shard: str) -> str:
    return ("model.safetensors" if shard.endswith("safetensors") else "pytorch_model.bin") + (
        ".index.json"
    )


def _join(folder: Path, parts: Sequence[TensorSource]) -> Checkpoint:
    sources: dict[str, TensorSource] = {}
    for shard in parts:
        for key in shard.keys():  # noqa: SIM118 (a source is no mapping)
            if key in sources:
                raise CheckpointError(f"{folder}: {key} is stored in two shards")
            sources[key] = shard
    return Checkpoint(sources, str(folder))


class Recipes(Mapping[str, Array]):
    """Our tensors, each made from those of a checkpoint when it is used."""

    def __init__(self, table: Mapping[str, Recipe], checkpoint: TensorSource) -> None:
        self.table = table
        self.checkpoint = checkpoint

    def __getitem__(self, key: str) -> Array:
        recipe = self.table[key]
        return recipe.make(*(self._read(source) for source in recipe.sources))

    def codes(self, key: str) -> Codes | None:
        """The codes of a linear's weight that the checkpoint holds packed; None for any other."""
        recipe = self.table[key]
        plain = recipe.make is not transposed or not isinstance(self.checkpoint, Offers)
        return None if plain else cast(Offers, self.checkpoint).codes(recipe.sources[0])

    def _read(self, source: str) -> Array:
        """A stored tensor. Raises CheckpointError for what cannot be a weight, such as a NaN.

        Goldens would be made with the NaN too, so the build would not notice it.
        """
        tensor = self.checkpoint.read(source)
        if tensor.dtype.kind != "f":
            raise CheckpointError(
                f"{source} is stored as {tensor.dtype}, a weight is a floating-point number",
                hint="quantized checkpoints are not read; take the original's weights",
            )
        if not all(np.isfinite(block).all() for block in row_blocks(tensor)):
            raise CheckpointError(
                f"{source} holds NaN or infinite values",
                hint="the file is damaged or its training diverged; fetch the checkpoint again",
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


def check_tables(
    tables: Iterable[tuple[Mapping[str, Recipe], Shapes]],
    checkpoint: Checkpoint,
    unused: Iterable[str],
) -> None:
    """Raise CheckpointError for tensors that are missing, unexpected or of another shape.

    tables: recipes and our shapes, of each component. unused: globs of tensors that the
    checkpoint may hold and that are not read. All faults are counted, and the first three of each
    kind are named.
    """
    tables = list(tables)
    needed = {s for table, _ in tables for recipe in table.values() for s in recipe.sources}
    stored = set(checkpoint.keys())
    globs = (*unused, *checkpoint.idle)
    _refuse_placeholders(sorted(needed & stored), checkpoint)
    _refuse_quantized(stored, checkpoint)
    missing = sorted(needed - stored)
    extra = sorted(k for k in stored - needed if not any(fnmatchcase(k, g) for g in globs))
    faults = [*_listed("missing", missing), *_listed("unexpected", extra)]
    for table, shapes in tables:
        faults += _misshapen(table, shapes, checkpoint)
    if faults:
        raise CheckpointError(
            f"{checkpoint.where} does not fit the model its config describes: {'; '.join(faults)}",
            hint="check that config and weights belong together, and that every file arrived",
        )


def _refuse_placeholders(keys: Iterable[str], checkpoint: Checkpoint) -> None:
    empty = [key for key in keys if 0 in checkpoint.shape(key)]
    if empty:
        raise CheckpointError(
            f"{checkpoint.where} holds empty tensors, as DeepSpeed ZeRO-3 leaves them: "
            f"{', '.join(_listed('empty', empty))}",
            hint="in the folder of the training run: python zero_to_fp32.py . pytorch_model.bin; "
            "or train with stage3_gather_16bit_weights_on_model_save",
        )


def _refuse_quantized(keys: Iterable[str], checkpoint: Checkpoint) -> None:
    marks = (".qweight", ".qzeros", ".SCB", ".absmax", ".quant_map", ".weight_scale_inv")
    found = sorted(key for key in keys if key.endswith(marks))
    if found:
        raise CheckpointError(
            f"{checkpoint.where} holds weights that another program quantized: {found[0]}",
            hint=FLOAT_WEIGHTS,
        )


def _listed(kind: str, keys: Sequence[str]) -> list[str]:
    if not keys:
        return []
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return [f"{len(keys)} {kind}: {', '.join(keys[:3])}{more}"]


def _misshapen(table: Mapping[str, Recipe], shapes: Shapes, checkpoint: Checkpoint) -> list[str]:
    faults = []
    for name, recipe in table.items():
        if recipe.make not in (same, transposed) or recipe.sources[0] not in checkpoint:
            continue  # a computed tensor is checked when it is made
        order = -1 if recipe.make is transposed else 1
        stored = checkpoint.shape(recipe.sources[0])
        if stored[::order] != shapes[name]:
            faults.append(f"{recipe.sources[0]} is {stored}, expected {shapes[name][::order]}")
    return _listed("mis-shaped", faults)


class RandomWeights(Mapping[str, Array]):
    """Weights of a preset: reproducible from (seed, name), scaled so that values stay near 1.

    Linears and convolutions are uniform with variance 1 / inputs, embeddings with variance 1 / D,
    norms are ones, biases zeros. They serve to measure sizes and speed; their answers mean nothing.
    """

    def __init__(self, shapes: Shapes, seed: int, label: str) -> None:
        self._shapes = shapes
        self._seed = seed
        self._label = label

    def __getitem__(self, key: str) -> Array:
        return np.concatenate(list(self.blocks(key))) if self._shapes[key] else np.ones(())

    def blocks(self, key: str) -> Iterator[Array]:
        """The tensor in blocks along its first axis; the values do not depend on the block size."""
        shape = self._shapes[key]
        if key.endswith("bias") or (len(shape) == 1 and key.endswith("weight")):
            yield np.full(shape, 0.0 if key.endswith("bias") else 1.0, np.float32)
            return
        source = f"{self._seed}/{self._label}/{key}".encode()
        digest = hashlib.sha256(source).digest()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
        spread = np.float32(math.sqrt(12.0 / _fan_in(key, shape)))
        rows = max(BLOCK_BYTES // max(4 * math.prod(shape[1:]), 1), 1)
        for start in range(0, shape[0], rows):
            size = (min(rows, shape[0] - start), *shape[1:])
            values = generator.random(size, np.float32)
            values -= np.float32(0.5)
            values *= spread
            yield values

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _fan_in(key: str, shape: tuple[int, ...]) -> int:
    if len(shape) == 4:
        return math.prod(shape[1:])
    table = key.startswith(("embed", "position")) or len(shape) == 1
    return shape[-1] if table else shape[0]
