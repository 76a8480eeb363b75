"""Checkpoints as AutoGPTQ, GPTQModel and AutoAWQ write them, packed one code after another.

Written from the definition of the formats (the packing loops of AutoGPTQ's and AutoAWQ's linears),
and not as the reader's inverse: it goes over inputs and outputs in plain Python.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from edgevlm.toolkit.ops.vocabulary import Array

LAYERS = r"(language_model\.)?model\.layers\.\d+\.(self_attn|mlp)\."
LINEARS = LAYERS + r"\w+_proj\.weight"
_AWQ_LOWEST_FIRST = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Kind:
    """One way to quantize. group: -1 for one of all inputs; changes: of quantization_config."""

    method: str = "gptq"
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    v2: bool = False
    desc_act: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The quantization_config that the programs write."""
        both = {"quant_method": self.method, "bits": self.bits, "group_size": self.group}
        if self.method == "awq":
            own: dict[str, Any] = {
                "version": "gemm",
                "zero_point": True,
                "modules_to_not_convert": ["vision_tower"],
            }
        else:
            own = {
                "desc_act": self.desc_act,
                "sym": self.symmetric,
                "checkpoint_format": "gptq_v2" if self.v2 else "gptq",
                "damp_percent": 0.01,
                "static_groups": False,
                "true_sequential": True,
                "model_name_or_path": None,
                "model_file_base_name": "model",
            }
        return {**both, **own, **self.changes}


@dataclass(frozen=True)
class Linear:
    """A quantized linear: its tensors by the last part of their names, and what they stand for.

    codes [inputs, outputs]; zeros and scales [groups, outputs]; weight [outputs, inputs].
    """

    tensors: dict[str, Array]
    codes: Array
    zeros: Array
    scales: Array
    weight: Array


def word(codes: Sequence[int], bits: int) -> int:
    """The signed 32-bit number with these codes, the first in the lowest bits."""
    value = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    return value - (1 << 32) if value >= 1 << 31 else value


def along_inputs(codes: Array, bits: int) -> Array:
    """GPTQ's qweight: int32 [inputs / n, outputs]."""
    count = 32 // bits
    return np.asarray(
        [
            [word(list(codes[start : start + count, o]), bits) for o in range(codes.shape[1])]
            for start in range(0, len(codes), count)
        ],
        np.int32,
    )


def along_outputs(codes: Array, bits: int, order: Sequence[int]) -> Array:
    """int32 [rows, outputs / n]: of n outputs, number order[0] is in the lowest bits."""
    count = 32 // bits
    return np.asarray(
        [
            [
                word([row[start + place] for place in order], bits)
                for start in range(0, len(row), count)
            ]
            for row in codes
        ],
        np.int32,
    )


def linear(inputs: int, outputs: int, kind: Kind, seed: int = 0) -> Linear:
    """A linear with random codes, zero points and scales."""
    generator = np.random.default_rng(seed)
    group, middle = inputs if kind.group == -1 else kind.group, 1 << (kind.bits - 1)
    groups = -(-inputs // group)
    codes = generator.integers(0, 2 * middle, (inputs, outputs))
    zeros = np.full((groups, outputs), middle)
    if kind.method == "awq" or not kind.symmetric:  # the first format of GPTQ holds no zero
        zeros = generator.integers(1, 2 * middle, zeros.shape)
        if kind.method == "awq" or kind.v2:
            zeros[0, 0] = 0
    scales = (generator.uniform(0.5, 1.5, zeros.shape) * 0.25 / middle).astype(np.float16)
    of_input = [i // group for i in range(inputs)]
    if kind.desc_act:
        of_input = [of_input[place] for place in generator.permutation(inputs)]
    weight = np.empty((outputs, inputs), np.float32)
    for i, g in enumerate(of_input):
        weight[:, i] = (codes[i] - zeros[g]).astype(np.float32) * scales[g].astype(np.float32)
    if kind.method == "awq":
        tensors = {
            "qweight": along_outputs(codes, 4, _AWQ_LOWEST_FIRST),
            "qzeros": along_outputs(zeros, 4, _AWQ_LOWEST_FIRST),
        }
    else:
        tensors = {
            "qweight": along_inputs(codes, kind.bits),
            "qzeros": along_outputs(zeros - (not kind.v2), kind.bits, range(32 // kind.bits)),
            "g_idx": np.asarray(of_input, np.int32),
        }
    return Linear({**tensors, "scales": scales}, codes, zeros, scales, weight)


def quantize(folder: Path, kind: Kind, which: str = LINEARS) -> dict[str, Array]:
    """Pack the linears of a float checkpoint whose names match; the floats that they stand for.

    The codes are random: the weights of the folder give no more than their shapes.
    """
    tensors = load_file(folder / "model.safetensors")
    expected, stored = {}, {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if not re.fullmatch(which, name):
            stored[name] = tensor
            continue
        outputs, inputs = tensor.shape
        made = linear(inputs, outputs, kind, seed=number)
        expected[name] = made.weight
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{part}": value for part, value in made.tensors.items()}
    assert expected
    save_file(stored, folder / "model.safetensors")
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": kind.config()}
    path.write_text(json.dumps(config))
    return expected


def float_twin(folder: Path, out: Path, expected: dict[str, Array]) -> Path:
    """The checkpoint with these floats in the place of what is packed."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    modules = tuple(f"{name.removesuffix('.weight')}." for name in expected)
    parts = ("qweight", "qzeros", "scales", "g_idx")
    plain = {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.startswith(modules) and name.endswith(parts))
    }
    save_file(plain | expected, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out
