"""The class matrix of a tower's loss: one row per class, split over the ranks by class.

Saved as one safetensors file per rank, named by the classes in it. Reading takes the rows that a
rank owns from whichever files hold them, so a run may go on with another number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.training.towers.ranks import place, share

_BLOCK = 4096  # rows that are drawn together
_PATTERN = "classes-*.safetensors"


class ClassMatrix(nn.Module):
    """`weight` [own classes, channels] of `num_classes` rows in all; `own` is their range.

    Rows start as N(0, std^2), the same for any number of ranks. `draws` counts the random choices
    made during training; with the seed it decides the next one, and it is saved with the rows.
    Raises ConfigError if there are fewer classes than ranks.
    """

    def __init__(
        self, num_classes: int, channels: int, *, std: float = 0.01, seed: int = 0
    ) -> None:
        super().__init__()
        self.rank, ranks = place()
        if num_classes < ranks:
            raise ConfigError(f"{num_classes} classes cannot be split over {ranks} processes")
        self.num_classes, self.seed, self.draws = num_classes, seed, 0
        self.own = share(num_classes, self.rank, ranks)
        rows = _normal_rows(self.own, num_classes, channels, seed)
        self.weight = nn.Parameter(rows * std)

    def local(self, labels: Tensor) -> Tensor:
        """Labels as rows of `weight`; -1 for classes of other ranks and for labels below 0."""
        inside = (labels >= self.own.start) & (labels < self.own.stop)
        return torch.where(inside, labels - self.own.start, -1)

    def generator(self, *, same_on_all_ranks: bool) -> torch.Generator:
        """For the next random choice, on the processor; two calls before `drawn` are alike."""
        part = 0 if same_on_all_ranks else 1 + self.rank
        return _generator(self.seed, self.draws, part)

    def drawn(self) -> None:
        """Count the choices of one step as made."""
        self.draws += 1


def _normal_rows(own: range, num_classes: int, channels: int, seed: int) -> Tensor:
    """Rows `own` of a matrix that is drawn block by block, each block from its own generator."""
    blocks = []
    for first in range(own.start // _BLOCK * _BLOCK, own.stop, _BLOCK):
        rows = min(_BLOCK, num_classes - first)
        block = torch.randn(rows, channels, generator=_generator(seed, first))
        blocks.append(block[max(own.start - first, 0) : own.stop - first])
    return torch.cat(blocks)


def _generator(*numbers: int) -> torch.Generator:
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


# -- files -------------------------------------------------------------------------------------


def save_classes(matrix: ClassMatrix, folder: Path, optimizer: Optimizer | None = None) -> Path:
    """Write this rank's rows and, if given, what the optimizer keeps for them; returns the file.

    Every rank calls it with the same folder, which is new for each save.
    """
    kept: dict[str, Any] = dict(optimizer.state.get(matrix.weight, {})) if optimizer else {}
    tensors = {"weight": matrix.weight.detach()}
    tensors |= {f"optimizer.{k}": torch.as_tensor(v) for k, v in kept.items()}
    counts = {"num_classes": matrix.num_classes, "draws": matrix.draws}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"classes-{matrix.own.start:09d}-{matrix.own.stop:09d}.safetensors"
    partial = path.with_suffix(".partial")
    whole = {k: v.contiguous().cpu() for k, v in tensors.items()}
    save_file(whole, partial, metadata={k: str(v) for k, v in counts.items()})
    os.replace(partial, path)
    return path


def load_classes(matrix: ClassMatrix, folder: Path, optimizer: Optimizer | None = None) -> None:
    """Read this rank's rows from what any number of ranks saved. Raises CheckpointError.

    optimizer: gets back what it kept for the rows, where that was saved.
    """
    with ExitStack() as opened:
        files = {
            range_: opened.enter_context(safe_open(path, framework="pt"))
            for path, range_ in _ranges(folder, matrix.num_classes)
        }
        metadata = next(iter(files.values())).metadata()
        if any(file.metadata() != metadata for file in files.values()):
            raise CheckpointError(
                f"{folder}: its files were saved at different steps",
                hint="a save was interrupted; take the one before",
            )
        if metadata["num_classes"] != str(matrix.num_classes):
            raise CheckpointError(
                f"{folder} holds {metadata['num_classes']} classes, the model has "
                f"{matrix.num_classes}"
            )
        names = list(next(iter(files.values())).keys())
        rows = {name: _rows(files, name, matrix.own) for name in names}
    if rows["weight"].shape != matrix.weight.shape:
        found, expected = list(rows["weight"].shape), list(matrix.weight.shape)
        raise CheckpointError(f"{folder}: this rank's classes are {found}, expected {expected}")
    with torch.no_grad():
        matrix.weight.copy_(rows.pop("weight"))
    matrix.draws = int(metadata["draws"])
    if optimizer is not None and rows:
        moved = {k: v if v.ndim == 0 else v.to(matrix.weight.device) for k, v in rows.items()}
        optimizer.state[matrix.weight] = {k.removeprefix("optimizer."): v for k, v in moved.items()}


def _ranges(folder: Path, num_classes: int) -> Iterator[tuple[Path, range]]:
    """The files in order and the classes in each, which together are all of them, once."""
    position = 0
    for path in sorted(folder.glob(_PATTERN)):
        start, stop = map(int, path.stem.split("-")[1:])
        if start != position:
            raise CheckpointError(
                f"{folder}: {path.name} does not follow class {position}",
                hint="a file is missing, or two saves went into one folder",
            )
        yield path, range(start, stop)
        position = stop
    if position == 0 or position < num_classes:
        raise CheckpointError(
            f"{folder} holds {position} of {num_classes} classes ({_PATTERN})",
            hint="every process writes its own file; copy them all",
        )


def _rows(files: dict[range, Any], name: str, own: range) -> Tensor:
    """Rows `own` of a tensor that is split over the files; a scalar from the first of them."""
    parts = []
    for classes, file in files.items():
        stored = file.get_slice(name)
        if not stored.get_shape():
            scalar: Tensor = file.get_tensor(name)
            return scalar
        first, last = max(own.start, classes.start), min(own.stop, classes.stop)
        if first < last:
            parts.append(stored[first - classes.start : last - classes.start])
    return torch.cat(parts)
