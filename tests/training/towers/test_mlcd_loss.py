"""MLCD's loss against the paper's formula in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.toolkit.errors import ConfigError
from edgevlm.training.towers.mlcd_loss import MlcdHead, mlc_loss, mlcd_loss

VARIANTS = [
    f"{name}_{negatives}"
    for name in ("literal", "scaled", "scaled_margin")
    for negatives in ("all", "sampled")
]


def difference(found: Tensor | float, expected: Any) -> float:
    """The largest difference, relative to the largest value."""
    array = np.asarray(expected)
    given = np.asarray(found.detach() if isinstance(found, Tensor) else found)
    assert given.shape == array.shape
    return float(np.abs(given - array).max() / np.abs(array).max())


def differences(golden: Path, variant: str, dtype: torch.dtype) -> dict[str, float]:
    """Of loss and gradients, by name."""
    inputs, outputs = np.load(golden / "inputs.npz"), np.load(golden / "outputs.npz")
    scale = 1.0 if "literal" in variant else float(inputs["scale"])
    margin = float(inputs["margin"]) if "margin" in variant else 0.0
    sampled = torch.from_numpy(inputs["sampled_classes"]) if "sampled" in variant else None
    labels = torch.from_numpy(inputs["labels"])
    figures = {}
    for loss, prefix in ((mlcd_loss, ""), (mlc_loss, "mlc_")):
        features, centres = (
            torch.from_numpy(inputs[k]).to(dtype).requires_grad_() for k in ("features", "centres")
        )
        value = loss(features, centres, labels, scale=scale, margin=margin, sampled=sampled)
        torch.autograd.backward(value)
        figures[f"{prefix}loss"] = difference(value, outputs[f"{variant}.{prefix}loss"])
        for name, tensor in (("features", features), ("centres", centres)):
            assert tensor.grad is not None
            key = f"{prefix}grad_{name}"
            figures[key] = difference(tensor.grad, outputs[f"{variant}.{key}"])
    return figures


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("golden", ["mlcd_loss"], indirect=True)
def test_loss_and_gradients_are_the_formulas(
    golden: Path, variant: str, dtype: torch.dtype
) -> None:
    exact = dtype == torch.float64
    for name, figure in differences(golden, variant, dtype).items():
        assert figure < (1e-8 if exact else 1e-3 if "grad" in name else 1e-5), (name, figure)


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(6, 16, generator=generator)
    centres = torch.randn(30, 16, generator=generator)
    labels = (features @ centres.T).topk(3).indices
    return features.to(dtype), centres.to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(dtype: torch.dtype) -> None:
    features, centres, labels = given(dtype)
    features[0] = centres[labels[0, 0]]  # a cosine of 1
    with torch.no_grad():
        features[1] = -centres[labels[1, 0]]  # and one of -1: exp(64)
    features.requires_grad_()
    centres.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mlcd_loss(features, centres, labels, scale=64.0, margin=0.3)
    torch.autograd.backward(loss)
    assert loss.dtype == torch.float32
    for tensor in (loss, features.grad, centres.grad):
        assert tensor is not None
        assert tensor.isfinite().all()
    wide, rows = (x.detach().double() for x in (features, centres))
    expected = mlcd_loss(wide, rows, labels, scale=64.0, margin=0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_absent_labels_and_negatives_count_nothing() -> None:
    features, centres, labels = given()
    centres.requires_grad_()
    padded = torch.cat([labels, torch.full_like(labels, -1)], 1)
    same = mlcd_loss(features, centres, padded, scale=1.0)
    torch.testing.assert_close(same, mlcd_loss(features, centres, labels, scale=1.0))
    only = mlcd_loss(features[:1], centres, labels[:1], scale=1.0, sampled=labels[0])
    torch.autograd.backward(only)  # no negative is left
    assert centres.grad is not None
    assert centres.grad.isfinite().all()
    cosines = torch.cosine_similarity(features[:1], centres[labels[0]])
    torch.testing.assert_close(only, torch.log1p((-cosines).exp().sum()))


def test_the_head_draws_other_negatives_each_step_and_all_in_evaluation() -> None:
    features, _, labels = given()
    head = MlcdHead(30, 16, scale=8.0, margin=0.0, sample_rate=0.5, seed=4)
    again = MlcdHead(30, 16, scale=8.0, margin=0.0, sample_rate=0.5, seed=4)
    losses = [head(features, labels).item() for _ in range(3)]
    assert len(set(losses)) == 3
    again.matrix.draws = 1
    assert again(features, labels).item() == losses[1]
    head.eval()
    expected = mlcd_loss(features, head.matrix.weight, labels, scale=8.0)
    torch.testing.assert_close(head(features, labels), expected)
    assert math.isfinite(losses[0])


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5])
def test_rates_out_of_range_are_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="sample_rate"):
        MlcdHead(30, 16, sample_rate=rate)
