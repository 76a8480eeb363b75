"""safetensors files against the package and torch: every type, every odd shape, every rounding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edgevlm.toolkit.checkpoints.safetensors_io import (
    STORAGE,
    SafetensorsFile,
    TensorSpec,
    from_bfloat16,
    row_blocks,
    to_bfloat16,
    write_safetensors,
)
from edgevlm.toolkit.errors import CheckpointError
from edgevlm.toolkit.ops.vocabulary import Array

TORCH = {
    "fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "int64": torch.int64, "int32": torch.int32, "int8": torch.int8, "uint8": torch.uint8,
    "bool": torch.bool, "fp8": torch.float8_e4m3fn,
}  # fmt: skip
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (0, 4), (4, 0), (1025, 3)]


def values(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    numbers = torch.randn(shape, generator=generator) * 50
    return numbers > 0 if dtype == "bool" else numbers.abs().to(TORCH[dtype])


def as_ours(tensor: torch.Tensor) -> Array:
    """bfloat16 as floats, FP8 as codes."""
    upcast = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    if tensor.dtype == torch.float8_e4m3fn:
        upcast = tensor.view(torch.uint8)
    found: Array = upcast.numpy()
    return found


def write(path: Path, tensors: dict[str, tuple[str, Array]]) -> Any:
    specs = [TensorSpec(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    return write_safetensors(path, specs, lambda t: iter([tensors[t.name][1]]))


ALL = {f"{dtype} {shape}": (dtype, values(dtype, shape)) for dtype in TORCH for shape in SHAPES}


def test_every_type_is_known_here() -> None:
    assert set(TORCH) == set(STORAGE)


def test_what_is_written_is_read_by_the_package(tmp_path: Path) -> None:
    written = write(tmp_path / "a", {n: (d, as_ours(t)) for n, (d, t) in ALL.items()})
    found = load_file(tmp_path / "a")
    assert set(found) == set(ALL)
    for name, (dtype, tensor) in ALL.items():
        assert found[name].dtype == TORCH[dtype]
        assert found[name].shape == tensor.shape
        np.testing.assert_array_equal(as_ours(found[name]), as_ours(tensor), name)
    data = (tmp_path / "a").read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (written.nbytes, written.sha256)


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    save_file({n: t for n, (_, t) in ALL.items()}, tmp_path / "a", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "a")
    assert set(file.keys()) == set(ALL)
    for name, (dtype, tensor) in ALL.items():
        found = file.read(name)
        assert file.entries[name].dtype == dtype
        assert file.shape(name) == found.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(found, as_ours(tensor))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = write(tmp_path / "a", {n: (d, as_ours(t)) for n, (d, t) in ALL.items()})
    file = SafetensorsFile(tmp_path / "a")
    assert file.entries == written.entries
    for name, (_, tensor) in ALL.items():
        np.testing.assert_array_equal(file.read(name), as_ours(tensor))


def test_offsets_are_those_of_the_bytes(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    small = np.arange(3, dtype=np.uint8)
    written = write(tmp_path / "a", {"small": ("uint8", small), "big": ("fp32", array)})
    data = (tmp_path / "a").read_bytes()
    for name, expected in (("big", array), ("small", small)):
        entry = written.entries[name]
        assert data[entry.offset : entry.offset + entry.nbytes] == expected.tobytes()


def test_big_tensors_start_on_a_page_and_small_ones_after_them(tmp_path: Path) -> None:
    shapes = {"page": (32, 32), "two": (64, 32), "line": (16,), "odd": (3,), "one": ()}
    tensors = {n: ("fp32", np.ones(s, np.float32)) for n, s in shapes.items()}
    entries = write(tmp_path / "a", tensors).entries
    assert [entries[n].offset % 4096 for n in ("page", "two")] == [0, 0]
    assert entries["line"].offset % 64 == 0
    assert all(entry.offset % 4 == 0 for entry in entries.values())


def test_no_tensors_make_a_file_too(tmp_path: Path) -> None:
    write(tmp_path / "a", {})
    assert load_file(tmp_path / "a") == {}
    assert SafetensorsFile(tmp_path / "a").keys() == []


# -- half precision ------------------------------------------------------------------------

ODD_BITS = [
    0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00008000, 0x00018000, 0x3F808000, 0x3F818000,
    0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7F7F8000, 0x7F7F7FFF,
]  # fmt: skip


def same_bfloat16(array: Array) -> None:
    expected = torch.from_numpy(array).to(torch.bfloat16)
    bits = to_bfloat16(array)
    found = torch.from_numpy(bits.astype(np.int32)).to(torch.int16).view(torch.bfloat16)
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(found), nan)
    assert torch.equal(found[~nan].view(torch.int16), expected[~nan].view(torch.int16))
    upcast = torch.from_numpy(from_bfloat16(bits))
    assert torch.equal(upcast[~nan], expected.float()[~nan])


def test_bfloat16_rounds_as_torch_does() -> None:
    nans = [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF]
    same_bfloat16(np.asarray(ODD_BITS + nans, np.uint32).view(np.float32))
    some = np.random.default_rng(1).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    same_bfloat16(some.view(np.float32))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bfloat16_of_any_floats(numbers: list[float]) -> None:
    same_bfloat16(np.asarray(numbers, np.float32))


def test_float16_rounds_as_torch_does(tmp_path: Path) -> None:
    array = np.random.default_rng(2).normal(0, 1e-5, 5000).astype(np.float32)
    array = np.concatenate([array, np.asarray([65504, -65519, 6e-8, 2.9e-8, 0.1], np.float32)])
    write(tmp_path / "a", {"x": ("fp16", array)})
    assert torch.equal(load_file(tmp_path / "a")["x"], torch.from_numpy(array).half())


def test_infinities_and_nan_stay(tmp_path: Path) -> None:
    array = np.asarray([np.inf, -np.inf, np.nan, 1], np.float32)
    write(tmp_path / "a", {"h": ("fp16", array), "b": ("bf16", array)})
    file = SafetensorsFile(tmp_path / "a")
    for name in ("h", "b"):
        np.testing.assert_array_equal(file.read(name).astype(np.float32), array)


@pytest.mark.parametrize(
    ("dtype", "numbers"),
    [
        ("fp16", [1.0, 65520.0]),
        ("fp16", [-1e6]),
        ("fp16", [np.inf, 1e6]),
        ("fp16", [np.nan, -1e6, 0.0]),
        ("fp32", np.asarray([1e300])),
        ("int8", np.asarray([128])),
        ("int8", np.asarray([-129, 3])),
        ("uint8", np.asarray([-1])),
        ("int32", np.asarray([1 << 31])),
        ("int8", [np.nan, 1.0]),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, dtype: str, numbers: Any) -> None:
    array = np.asarray(numbers, np.float32) if isinstance(numbers, list) else numbers
    with pytest.raises(CheckpointError, match=rf"weights\.x.*{dtype}"):
        write(tmp_path / "a", {"weights.x": (dtype, array)})


def test_what_fits_is_converted(tmp_path: Path) -> None:
    arrays = {"a": ("int8", np.asarray([-128, 127])), "b": ("fp32", np.asarray([0.5]))}
    write(tmp_path / "a", arrays)
    file = SafetensorsFile(tmp_path / "a")
    assert file.read("a").tolist() == [-128, 127]
    assert file.read("b").dtype == np.float32


# -- blocks and damage ---------------------------------------------------------------------


def test_a_tensor_may_come_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.toolkit.checkpoints.safetensors_io.BLOCK_BYTES", 100)
    array = np.arange(300, dtype=np.float32).reshape(60, 5)
    assert len(list(row_blocks(array))) == 12
    specs = [TensorSpec("x", "fp32", array.shape)]
    pieces = write_safetensors(tmp_path / "a", specs, lambda t: row_blocks(array))
    whole = write_safetensors(tmp_path / "b", specs, lambda t: [array])
    assert pieces == whole
    assert torch.equal(load_file(tmp_path / "a")["x"], torch.from_numpy(array))


@pytest.mark.parametrize("shape", [(3, 2), (4, 3), (4,), (4, 2, 1)])
def test_another_shape_than_stated_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    specs = [TensorSpec("x", "fp32", (4, 2))]
    with pytest.raises(CheckpointError, match="expected"):
        write_safetensors(tmp_path / "a", specs, lambda t: [np.zeros(shape, np.float32)])


def test_an_error_while_making_a_tensor_is_not_swallowed(tmp_path: Path) -> None:
    def broken(tensor: TensorSpec) -> Iterator[Array]:
        yield np.zeros((1, 2), np.float32)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_safetensors(tmp_path / "a", [TensorSpec("x", "fp32", (2, 2))], broken)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, {"x": ("fp32", np.ones((50, 50), np.float32))})
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="not a complete"):
            SafetensorsFile(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        SafetensorsFile(tmp_path / "missing")


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "U16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match="x is stored as U16"):
        SafetensorsFile(tmp_path / "a")
