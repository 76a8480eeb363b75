"""Torch's own files: read without running what is pickled in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.toolkit.checkpoints.weights import open_checkpoint
from edgevlm.toolkit.errors import CheckpointError
from edgevlm.training.torch_files import TorchFile, reader


class Evil:
    """Unpickled by an ordinary loader, this leaves a folder behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_never_runs(tmp_path: Path, zipped: bool) -> None:
    mark, path = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    tensors = {"a": torch.zeros(2), "b": Evil(mark)}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        TorchFile(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # and it would have
    assert mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_come_back_as_they_were(tmp_path: Path, zipped: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(5, 4, generator=generator)
    tensors = {
        "float32": values,
        "float16": values.half(),
        "bfloat16": values.bfloat16(),
        "int64": torch.arange(3),
        "bool": values[0] > 0,
        "turned": values.T,
        "slice": values[1:3, ::2],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(values * 2),
    }
    torch.save(tensors, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    file = TorchFile(tmp_path / "a.bin")
    assert list(file.keys()) == list(tensors)
    for name, tensor in tensors.items():
        found = file.read(name)
        assert file.shape(name) == found.shape == tuple(tensor.shape)
        expected = tensor.detach()
        wide = expected.float() if expected.dtype == torch.bfloat16 else expected
        np.testing.assert_array_equal(found, wide.numpy())
        assert found.flags.owndata


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, "state_dict"),
        ({"a": torch.zeros(1), "step": 3}, "step"),
        (torch.zeros(3), "Tensor"),
        ([torch.zeros(3)], "list"),
        ({1: torch.zeros(3)}, "1"),
    ],
)
def test_other_things_than_named_tensors_are_refused(tmp_path: Path, data: Any, named: str) -> None:
    torch.save(data, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=named):
        TorchFile(tmp_path / "a.bin")


@pytest.mark.parametrize("part", [0, 10, 400])
def test_damaged_files_are_refused(tmp_path: Path, part: int) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:part])
    with pytest.raises(CheckpointError, match=r"a\.bin cannot be read"):
        TorchFile(path)


def test_a_folder_of_torch_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    found = open_checkpoint(tmp_path, reader())
    np.testing.assert_array_equal(found.read("a"), [1, 1])
