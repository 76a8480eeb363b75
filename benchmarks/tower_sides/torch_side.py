"""torch: the model's own functions by the torch interpreter, weights laid out as nn.Linear's."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tower_sides import walk
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.ops.vocabulary import Weights
from edgevlm.toolkit.vlm.components import components
from edgevlm.training.torch_ops import TorchOps


class Ops(TorchOps):
    """Linears in one call with their bias."""

    def linear(self, x: Tensor, w: Weights[Tensor]) -> Tensor:
        return F.linear(x, w["weight"].t(), w.get("bias"))


def laid_out(array: Any, dtype: torch.dtype) -> Tensor:
    """A matrix as the transpose of a contiguous one, as nn.Linear keeps it; kernels as they are."""
    tensor = torch.from_numpy(np.array(array)).to(dtype)
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor


def open_model(model: walk.Model, options: Namespace) -> tuple[walk.Encode, dict[str, str]]:
    """--set dtype=float32|bfloat16, compiled=1: by inductor, weights frozen into the code."""
    torch.set_num_threads(options.threads)
    dtype, ops = getattr(torch, options.settings["dtype"]), Ops()
    bundle, names = Bundle.open(options.bundle), {part.name for part in model.parts}
    parts = {c.name: c for c in components(bundle.model) if c.name in names}
    weights = {
        name: Weights({key: laid_out(x, dtype) for key, x in bundle.tensors(name).items()})
        for name in parts
    }

    def whole(pixels: Mapping[str, Tensor]) -> Any:
        return model.run(lambda n, inputs: parts[n].forward(ops, weights[n], inputs), pixels)

    if "compiled" in options.settings:
        import torch._inductor.config as inductor

        inductor.freezing = True
        whole = torch.compile(whole)

    @torch.no_grad()
    def encode(pixels: Mapping[str, Any]) -> Any:
        given = {name: torch.from_numpy(array).to(dtype) for name, array in pixels.items()}
        return whole(given).float().numpy()

    return encode, {"torch": str(torch.__version__)}


if __name__ == "__main__":
    walk.measure(open_model)
