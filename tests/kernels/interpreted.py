"""Every kernel on small tensors in Triton's interpreter, against the reference.

    TRITON_INTERPRET=1 python -m tests.kernels.interpreted

prints, as JSON, the largest difference of each call in each number format as a share of the
largest value. Kernels read the variable when they are imported, hence a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from edgevlm.engines.plugins.catalogue import SMALL, Site
from edgevlm.engines.plugins.layer_merge import kernel as merge
from edgevlm.engines.plugins.ms_deform_attn import kernel as deform
from edgevlm.engines.plugins.rotary import kernel as rotary
from edgevlm.engines.plugins.trial import difference, trial

RUNS: dict[str, Callable[..., Any]] = {
    "MSDeformAttn": deform.run,
    "LayerMerge": merge.run,
    "RotaryAttention": rotary.run,
}


def worst(site: Site, dtype: str) -> float:
    """The largest difference of a call's results as a share of the largest value."""
    asked = trial(site, dtype, np.random.default_rng(0))
    tensors = [torch.from_numpy(array.copy()) for array in asked.inputs]
    bits = [t.view(torch.bfloat16) if t.dtype == torch.uint16 else t for t in tensors]
    found = RUNS[site.op](*bits, site.at)
    many = found if isinstance(found, tuple) else (found,)
    pairs = zip(many, asked.expected, strict=True)
    return max(difference(y.float().numpy(), expected) for y, expected in pairs)


if __name__ == "__main__":
    formats = ("fp32", "fp16", "bf16")
    print(json.dumps({f"{site.name}, {d}": worst(site, d) for site in SMALL for d in formats}))
