"""Averaged weights (EMA): a second copy of what is trained, which follows it slowly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """After every step: average = decay * average + (1 - decay) * weight, in float32.

    The decay is smaller in the first steps, (1 + n) / (10 + n), so that the start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._count = 0
        self._followed = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.tensors = {n: p.detach().float().clone() for n, p in self._followed.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights of a step."""
        self._count += 1
        decay = min(self._decay, (1 + self._count) / (10 + self._count))
        for name, parameter in self._followed.items():
            self.tensors[name].lerp_(parameter.detach().float(), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """What a state keeps."""
        return {"count": self._count, "tensors": self.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict."""
        self._count = state["count"]
        for name, tensor in state["tensors"].items():
            self.tensors[name].copy_(tensor)

    def replacing(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with the averaged ones in place of the trained ones."""
        return {**tensors, **self.tensors}
