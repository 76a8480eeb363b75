"""A published checkpoint's tensors with ours in the place of those that they were made from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgevlm.toolkit.checkpoints import shards
from edgevlm.toolkit.checkpoints.safetensors_io import (
    STORAGE,
    TensorSpec,
    from_bfloat16,
    row_blocks,
    to_bfloat16,
)
from edgevlm.toolkit.checkpoints.weights import Checkpoint
from edgevlm.toolkit.errors import CheckpointError
from edgevlm.toolkit.models.recipes import Recipe, same, transposed
from edgevlm.toolkit.ops.vocabulary import Array

_FORMAT = {"format": "pt"}  # transformers refuses files that do not say so


@dataclass(frozen=True)
class Part:
    """A component's tensors: ours by name, and the recipes by which a checkpoint holds them."""

    table: Mapping[str, Recipe]
    ours: Mapping[str, Array]


@dataclass(frozen=True)
class _Use:
    """One of our tensors that a stored tensor belongs to."""

    recipe: Recipe
    name: str
    ours: Mapping[str, Array]


class Edited:
    """The stored tensors, those of `parts` with our values.

    A tensor whose values did not change stays as it is stored, bit for bit; a changed one has
    `dtype`. copies: stored names of tied tensors, and whose copy they are.
    """

    def __init__(
        self,
        stored: Checkpoint,
        parts: Sequence[Part],
        dtype: str,
        copies: Mapping[str, str] | None = None,
    ) -> None:
        self.stored = stored
        self._dtype = dtype
        self._copies = dict(copies or {})
        self._uses: dict[str, list[_Use]] = defaultdict(list)
        self._found: dict[tuple[str, str, bool], bool] = {}  # comparing reads two whole tensors
        for part in parts:
            for name, recipe in part.table.items():
                for source in recipe.sources:
                    self._uses[source].append(_Use(recipe, name, part.ours))

    def keys(self) -> list[str]:
        """Names of the stored tensors, then of those that the checkpoint does not have yet."""
        known = self.stored.keys()
        return [*known, *sorted(set(self._uses) - set(known))]

    def changed(self, *, rounded: bool = False) -> bool:
        """Whether any value differs; rounded: by more than rounding to the dtype of ours."""
        return any(self._changes(use, rounded) for uses in self._uses.values() for use in uses)

    def read(self, key: str) -> Array:
        """One tensor with our values.

        Raises CheckpointError if values changed that cannot be put back.
        """
        key = self._copies.get(key, key)
        tensor = self.stored.read(key) if key in self.stored else np.zeros(())
        for use in self._uses.get(key, ()):
            if not self._changes(use):
                continue
            if use.recipe.undo is None:
                raise CheckpointError(
                    f"{use.name} was trained, and {', '.join(use.recipe.sources[:3])} of "
                    f"{self.stored.where} cannot be computed from it",
                    hint="the trained checkpoint itself has it; export that",
                )
            sources = [tensor if s == key else self._stored(s) for s in use.recipe.sources]
            made = use.recipe.undo(use.ours[use.name], *sources)
            tensor = made[use.recipe.sources.index(key)]
        return tensor

    def spec(self, key: str, name: str) -> TensorSpec:
        """How one tensor is to be written, under `name`; its values are read for that."""
        tensor = self.read(key)
        whole = self._copies.get(key, key)
        changing = [use for use in self._uses.get(whole, ()) if self._changes(use)]
        if not changing:
            return TensorSpec(name, self.stored.dtype(key), tensor.shape)
        replaced = all(use.recipe.make in (same, transposed) for use in changing)
        dtype = self._dtype
        if not replaced and whole in self.stored and self.stored.dtype(whole) != dtype:
            dtype = "fp32"  # what stays must not be rounded
        return TensorSpec(name, dtype, tensor.shape)

    def _changes(self, use: _Use, rounded: bool = False) -> bool:
        key = (use.recipe.sources[0], use.name, rounded)
        if key not in self._found:
            self._found[key] = self._compare(use, rounded)
        return self._found[key]

    def _compare(self, use: _Use, rounded: bool) -> bool:
        if any(source not in self.stored for source in use.recipe.sources):
            return True
        made, ours = use.recipe.make(*map(self.stored.read, use.recipe.sources)), use.ours[use.name]
        if rounded and self._dtype == "bf16":
            made = from_bfloat16(to_bfloat16(made))
        elif rounded:
            made = made.astype(STORAGE[self._dtype])
        return not np.array_equal(made, ours)

    def _stored(self, key: str) -> Array:
        return self.stored.read(key) if key in self.stored else np.zeros(())


@dataclass(frozen=True)
class Item:
    """A tensor to be written, under `name`: tensor `key` of `tensors`."""

    name: str
    tensors: Edited
    key: str


def items(tensors: Edited) -> list[Item]:
    """All tensors of a checkpoint under their own names."""
    return [Item(key, tensors, key) for key in tensors.keys()]  # noqa: SIM118 (no mapping)


def write(folder: Path, listed: Sequence[Item], *, like: Checkpoint | None = None) -> None:
    """Write tensors as safetensors with an index; `like`: into files as that checkpoint has them.

    A tensor that it does not have goes into the last of them. Some loaders read a tensor from a
    file of a fixed name, so files keep theirs. Raises CheckpointError as Edited.read does.
    """
    by_name = {item.name: item for item in listed}
    specs = [item.tensors.spec(item.key, item.name) for item in listed]
    files = _as_stored(specs, like) if like is not None else None

    def produce(spec: TensorSpec) -> Iterator[Array]:
        item = by_name[spec.name]
        yield from row_blocks(item.tensors.read(item.key))

    shards.write(folder, shards.split(specs) if files is None else files, produce, _FORMAT)


def _as_stored(specs: Sequence[TensorSpec], like: Checkpoint) -> dict[str, list[TensorSpec]] | None:
    """The tensors by file as `like` has them; None if it is no set of whole files."""
    places = {key: like.file(key) for key in like.keys()}  # noqa: SIM118 (no mapping)
    if not places or any(path is None for path in places.values()):
        return None
    files = sorted({path for path in places.values() if path is not None})
    if len({path.parent for path in files}) > 1:
        return None
    names = {path: _as_safetensors(path.name) for path in files}
    found: dict[str, list[TensorSpec]] = {names[path]: [] for path in files}
    for spec in specs:
        found[names[places.get(spec.name) or files[-1]]].append(spec)
    return {name: group for name, group in found.items() if group}


def _as_safetensors(name: str) -> str:
    """The name of a safetensors file in the place of a torch file."""
    stem = name.rsplit(".", 1)[0]
    return f"{stem.replace('pytorch_model', 'model', 1)}.safetensors"
