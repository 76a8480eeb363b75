"""Torch's own weight files, read tensor by tensor with weights_only: no pickled code runs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

from edgevlm.toolkit.checkpoints.weights import TorchReader, refuse_pointer
from edgevlm.toolkit.errors import CheckpointError
from edgevlm.toolkit.ops.vocabulary import Array

_PIECE = 1 << 22
_DTYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def reader() -> TorchReader | None:
    """A reader for .bin and .pt files, None where torch is not installed."""
    return TorchFile if find_spec("torch") is not None else None


class TorchFile:
    """One file, mapped into memory; a tensor is copied when it is read.

    With the first tensor, the whole file is compared with its checksums. Raises CheckpointError.
    """

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        refuse_pointer(path)
        self._unchecked = _require_plain(path)
        try:  # files from before torch 1.6 are no zip archives; they cannot be mapped
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd files, which are read or refused
                content = torch.load(
                    path, map_location="cpu", mmap=is_zipfile(path), weights_only=True
                )
        except MemoryError:
            raise
        except Exception as broken:  # unpickling raises anything
            raise CheckpointError(
                f"{path} cannot be read as torch weights: {_reason(broken)}",
                hint="the file is damaged, or holds more than tensors; safetensors are safer",
            ) from None
        self._tensors = _named_tensors(content, path)

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> str:
        """In which dtype a tensor is stored, in our names (fp32, bf16, ...)."""
        name = str(self._tensors[key].dtype).removeprefix("torch.")
        return _DTYPES.get(name, name)

    def read(self, key: str) -> Array:
        """One tensor; bfloat16 comes back as float32. Raises CheckpointError for a damaged file, or
        a type that is not read.
        """
        import torch

        if self._unchecked:
            _compare(self.path)
            self._unchecked = False
        tensor = self._tensors[key].detach().resolve_conj().resolve_neg()
        try:
            if tensor.dtype == torch.bfloat16:
                tensor = tensor.float()
            array: Array = tensor.contiguous().numpy().copy()
        except (TypeError, RuntimeError):
            raise CheckpointError(
                f"{self.path}: {key} is stored as {self.dtype(key)}, which edgevlm does not read"
            ) from None
        return array


def _require_plain(path: Path) -> bool:
    """Whether a file is an archive with checksums of its records; torch can be told to write none.

    Raises CheckpointError for compressed records: torch maps them into memory as they are.
    """
    if not is_zipfile(path):
        return False
    with _archive(path) as archive:
        records = archive.infolist()
    packed = [record.filename for record in records if record.compress_type != ZIP_STORED]
    if packed:
        raise CheckpointError(
            f"{path}: {packed[0]} is compressed, which torch's own files are not",
            hint="pack it again without compression: zip -0, or torch.save in the program it is of",
        )
    return any(record.CRC for record in records)


@contextmanager
def _archive(path: Path) -> Iterator[ZipFile]:
    try:
        with ZipFile(path) as archive:
            yield archive
    except (BadZipFile, NotImplementedError, OSError, ValueError, RuntimeError, EOFError) as broken:
        raise CheckpointError(
            f"{path} was changed or damaged: {broken}", hint="fetch this file again"
        ) from None


def _compare(path: Path) -> None:
    """Raise CheckpointError if a record is not what its checksum says."""
    with _archive(path) as archive:
        for record in archive.infolist():
            with archive.open(record) as file:
                while file.read(_PIECE):  # the last piece raises BadZipFile
                    pass


def _reason(broken: Exception) -> str:
    """Why torch does not read a file, without its advice: to load it with weights_only=False would
    run what is in it.
    """
    text = str(broken)
    if isinstance(broken, UnpicklingError):
        found = re.search(r"GLOBAL ([\w.]{1,80})", text)
        return f"it holds {found[1]}, not tensors alone" if found else "it is no pickle of tensors"
    if "weights_only" in text:
        return "it is an archive of another kind, such as TorchScript"
    return re.split(r"[\n]|(?<=[a-z])\. ", text or type(broken).__name__)[0]


def _named_tensors(content: Any, path: Path) -> dict[str, Any]:
    """The file's content, if it is nothing but tensors by name."""
    import torch

    hint = "save the state dict alone: torch.save(model.state_dict(), PATH)"
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not tensors", hint=hint)
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise CheckpointError(f"{path}: {name!r} is a {kind}, not a named tensor", hint=hint)
        odd = value.is_quantized or value.is_nested or value.is_meta
        if odd or value.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {name} is a quantized, nested, sparse or empty (meta) tensor, "
                "which edgevlm does not read",
                hint="save plain tensors: dequantize(), to_dense(), or load the weights first",
            )
    return content
