"""Torch's own weight files, read tensor by tensor with weights_only: no pickled code runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from edgevlm.toolkit.checkpoints.weights import TorchReader
from edgevlm.toolkit.errors import CheckpointError
from edgevlm.toolkit.ops.vocabulary import Array

_DTYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def reader() -> TorchReader | None:
    """A reader for .bin and .pt files, None where torch is not installed."""
    return TorchFile if find_spec("torch") is not None else None


class TorchFile:
    """One file, mapped into memory; a tensor is copied when it is read."""

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path

        try:  # files from before torch 1.6 are no zip archives; they cannot be mapped
            content = torch.load(path, map_location="cpu", mmap=is_zipfile(path), weights_only=True)
        except Exception as broken:  # unpickling raises anything
            reason = (str(broken) or type(broken).__name__).splitlines()[0]
            raise CheckpointError(
                f"{path} cannot be read as torch weights: {reason}",
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
        """One tensor; bfloat16 comes back as float32."""
        import torch

        tensor = self._tensors[key].detach()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        array: Array = tensor.contiguous().numpy().copy()
        return array


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
    return content
