"""Torch files: tensors alone are read, no code runs, damage is told, and torch's advice is not."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.toolkit.errors import CheckpointError
from edgevlm.training.torch_files import TorchFile


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def saved(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def one(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"a": tensor}


PLAIN = torch.arange(2000.0)


def test_views_parameters_and_old_files_are_read(tmp_path: Path) -> None:
    old = saved(one(PLAIN), tmp_path / "old", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(TorchFile(old).read("a"), PLAIN.numpy())
    for name, tensor in {
        "plain": PLAIN,
        "negative": torch._neg_view(-PLAIN),
        "parameter": torch.nn.Parameter(PLAIN),
        "strided": torch.stack([PLAIN, PLAIN], 1)[:, 0],
    }.items():
        file = TorchFile(saved(one(tensor), tmp_path / name))
        np.testing.assert_array_equal(file.read("a"), PLAIN.numpy())


REFUSED: dict[str, tuple[Any, str]] = {
    "code": (one(Code()), "holds posix.system, not tensors alone"),  # type: ignore[arg-type]
    "module": (torch.nn.Linear(2, 2), "holds torch.nn.modules.linear.Linear"),
    "sparse": (one(PLAIN.to_sparse()), "a is a quantized, nested, sparse or empty"),
    "meta": (one(torch.empty(3, device="meta")), "a is a quantized, nested, sparse or empty"),
    "wrapped": ({"state_dict": one(PLAIN)}, "'state_dict' is a dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_tensor_is_refused(case: str, tmp_path: Path) -> None:
    content, reason = REFUSED[case]
    with pytest.raises(CheckpointError, match=reason) as refused:
        TorchFile(saved(content, tmp_path / "file.bin"))
    assert "weights_only" not in refused.value.message + refused.value.hint
    assert not Path("ran").exists()


def test_a_number_format_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    file = TorchFile(saved(one(PLAIN.to(torch.float8_e4m3fn)), tmp_path / "file.bin"))
    with pytest.raises(CheckpointError, match="a is stored as float8_e4m3fn"):
        file.read("a")


FILES = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "page": (b"<!doctype html><html>", "it is no pickle of tensors"),
    "pickle": (pickle.dumps(Code()), "it is no pickle of tensors"),
    "empty": (b"", "EOFError"),
}


@pytest.mark.parametrize("case", FILES)
def test_other_files_are_refused_without_torchs_advice(case: str, tmp_path: Path) -> None:
    data, reason = FILES[case]
    (tmp_path / "file.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as refused:
        TorchFile(tmp_path / "file.bin")
    assert "weights_only" not in refused.value.message
    assert not Path("ran").exists()


def test_another_kind_of_archive_is_named(tmp_path: Path) -> None:
    shutil.copy(saved(one(PLAIN), tmp_path / "file.bin"), tmp_path / "other.bin")
    with zipfile.ZipFile(tmp_path / "other.bin", "a") as archive:
        archive.writestr("file/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="such as TorchScript") as refused:
        TorchFile(tmp_path / "other.bin")
    assert "weights_only" not in refused.value.message


def test_damage_is_told_before_the_first_tensor(tmp_path: Path) -> None:
    path = saved(one(PLAIN), tmp_path / "file.bin")
    data = bytearray(path.read_bytes())
    data[data.index(PLAIN.numpy()[1000:1010].tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed or damaged: Bad CRC-32"):
        TorchFile(path).read("a")
    path.write_bytes(data[:-50])
    with pytest.raises(CheckpointError, match="cannot be read as torch weights"):
        TorchFile(path)


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(one(PLAIN), tmp_path / "file.bin")
    finally:
        torch.serialization.set_crc32_options(before)
    np.testing.assert_array_equal(TorchFile(path).read("a"), PLAIN.numpy())


def test_a_packed_archive_is_refused(tmp_path: Path) -> None:
    """Torch maps its records into memory as they are: it would read packed bytes as numbers."""
    path = saved(one(PLAIN), tmp_path / "file.bin")
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(tmp_path / "packed.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(CheckpointError, match="is compressed"):
        TorchFile(tmp_path / "packed.bin")
