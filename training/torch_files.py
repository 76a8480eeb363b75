"""Torch's own weight files, read tensor by tensor with weights_only: no pickled code runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.ops import Array
from toolkit.weights import TorchReader


def reader() -> TorchReader | None:
    """A reader for .bin and .pt files, None where torch is not installed."""
    return TorchFile if find_spec("torch") is not None else None


class TorchFile:
    """One file, mapped into memory; a tensor is copied when it is read."""

    def __init__(self, path: Path) -> None:
        import torch

        try:
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as broken:  # unpickling raises anything
            reason = (str(broken) or type(broken).__name__).splitlines()[0]
            raise CheckpointError(
                f"{path} cannot be read as torch weights: {reason}",
                hint="the file is damaged, or holds more than tensors; safetensors are safer",
            ) from None
        if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
            raise CheckpointError(
                f"{path} is not a table of tensors",
                hint="save the model's state_dict alone into a file",
            )
        self._tensors: dict[str, Any] = found

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._tensors[key].shape)

    def read(self, key: str) -> Array:
        """One tensor; bfloat16 comes back as float32."""
        import torch

        tensor = self._tensors[key]
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        array: Array = tensor.contiguous().numpy().copy()
        return array
