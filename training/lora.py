"""Low-rank adapters (Hu et al., arXiv 2106.09685): y = x W + (alpha / rank) x A B.

A plain pair of tensors beside each matrix instead of peft's modules: the model's layers are
functions over named tensors, and merging them is one addition. A finished run saves merged weights,
so that an adapted model exports like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from edgevlm.toolkit.errors import ConfigError
from edgevlm.training.vlm import VLM, attach, linear_weights

HEAD = "lm.head.weight"  # never adapted, as in the published scripts


def add(model: VLM, rank: int, *, alpha: float, dropout: float, on: str, seed: int) -> list[str]:
    """Give every linear whose name matches the glob `on` an adapter; names of the adapted matrices.

    A is drawn as torch draws a linear's weights, B is zero, so that the model is unchanged at
    first. Raises ConfigError if nothing matches.
    """
    generator = torch.Generator().manual_seed(seed)
    adapted = []
    for name, part in model.parts.items():
        keys = [f"{name}.{key}" for key in linear_weights(model.model, part)]
        chosen = [key for key in keys if fnmatchcase(key, on) and key != HEAD]
        if not chosen:
            continue
        for key in chosen:
            inputs, outputs = model.get_parameter(key).shape
            stem = key.removesuffix("weight")
            bound = 1 / math.sqrt(inputs)
            down = torch.empty(inputs, rank).uniform_(-bound, bound, generator=generator)
            attach(model, stem + "lora_a", nn.Parameter(down))
            attach(model, stem + "lora_b", nn.Parameter(torch.zeros(rank, outputs)))
        op = model.train_ops[name]
        op.lora_scale, op.dropout = alpha / rank, dropout
        adapted += chosen
    if not adapted:
        raise ConfigError(
            f"--lora-on {on!r} matches no linear of the model",
            hint="names are COMPONENT.TENSOR, such as lm.layers.*.attention.q.weight",
        )
    return adapted


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter's two."""
    return name.endswith((".lora_a", ".lora_b"))


def merged(tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """The tensors with every adapter added to its matrix, and no adapters.

    scales: alpha / rank by component. The sums are made in float32.
    """
    whole = {name: x for name, x in tensors.items() if not is_adapter(name)}
    for name, down in tensors.items():
        if not name.endswith(".lora_a"):
            continue
        stem = name.removesuffix("lora_a")
        scale = next(s for component, s in scales.items() if name.startswith(f"{component}."))
        update = scale * (down.float() @ tensors[stem + "lora_b"].float())
        matrix = whole[stem + "weight"]
        whole[stem + "weight"] = (matrix.float() + update).to(matrix.dtype)
    return whole
