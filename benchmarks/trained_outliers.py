"""Outliers of benchmarks/trained.py: what the linears of a trained language model get as inputs,
and what rounding these to 8 bits costs, by rows, by blocks and with one step for a whole tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.calibration.many import Many, ManyOps, hidden
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.quantization import blockwise, channels
from edgevlm.toolkit.vlm.components import lm_component

KINDS = ("attention/q", "attention/k", "attention/v", "attention/out", "mlp/gate", "mlp/up",
         "mlp/down")  # fmt: skip


@dataclass(frozen=True)
class Linear:
    """A linear and its input. channel: the one that gets the largest value, channel_ratio: that
    over the median channel's largest; token, token_ratio: the same of positions of a window.

    Errors are of the outputs, relative, of the median token: by_rows of inputs and weights as in
    int8_rows; inputs_by_rows of the inputs alone; by_blocks as in int8_weights where its input is
    rounded in the same blocks; by_tensor with one step for all inputs, the largest value's.
    """

    path: str
    channel: int
    channel_ratio: float
    token: int
    token_ratio: float
    by_rows: float
    inputs_by_rows: float
    by_blocks: float
    by_tensor: float


@dataclass
class Watch(ManyOps):
    """Looks at every linear's inputs on their way."""

    found: list[Linear] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def linear(self, x: Many, w: Weights[Any]) -> Many:
        if w.path.startswith("layers."):
            self.found.append(of_linear(w.path, x, np.asarray(w["weight"], np.float32)))
        return super().linear(x, w)


def of_model(bundle: Path, windows: Array) -> list[Linear]:
    """Every linear of the layers of a float bundle's language model, on windows of ids."""
    source = systems.load(bundle, Options())
    lm, watch = lm_component(source.model.lm), Watch()
    hidden(lm, watch, source.weights[lm.name], windows)
    return watch.found


def of_linear(path: str, windows: Many, weight: Array) -> Linear:
    """One linear with its inputs [1, S, D] for each window."""
    x = windows.joined()[0]
    size = np.abs(x)
    by_channel, by_token = size.max(0), size.max(1)
    channel, token = int(by_channel.argmax()), int(by_token.argmax()) % windows[0].shape[1]
    steps = channels.scales(weight)
    rounded = channels.dequantize(np.concatenate([*channels.codes(weight, steps)]), steps)
    block = blockwise.block_of(len(weight))
    assert block is not None
    blocked = blockwise.dequantize(*blockwise.quantize(weight.T, 8), 8).T
    pieces = channels.round_rows(x.reshape(len(x), -1, block)).reshape(x.shape)
    step = max(float(size.max()), channels.SMALLEST) / channels.LARGEST
    plain, rows = x @ weight, channels.round_rows(x)
    return Linear(
        path,
        channel,
        float(by_channel.max() / np.median(by_channel)),
        token,
        float(by_token.max() / np.median(by_token)),
        _error(plain, rows @ rounded),
        _error(plain, rows @ weight),
        _error(plain, pieces @ blocked),
        _error(plain, np.rint(x / np.float32(step)) * np.float32(step) @ rounded),
    )


def _error(plain: Array, found: Array) -> float:
    errors = np.linalg.norm(found - plain, axis=-1) / np.linalg.norm(plain, axis=-1)
    return float(np.median(errors))


def by_kind(found: list[Linear]) -> Mapping[str, list[Linear]]:
    """The linears of each kind, over the layers."""
    return {kind: [one for one in found if one.path.endswith(kind)] for kind in KINDS}
