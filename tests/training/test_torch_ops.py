"""TorchOps beyond single ops: blocks that are recomputed, tables that are copied once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Weights
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.quantization.quantize import Quantize
from edgevlm.training.torch_ops import TorchOps
from tests.toolkit.models.test_architectures import component, feed, tensors
from tests.toolkit.ops.test_wrappers import calibrated

LAYERED = [
    ("encoders", "clip"),
    ("encoders", "mlcd"),
    ("encoders", "dinov2"),
    ("encoders", "convnext"),
    ("encoders", "unireplknet"),
    ("lms", "llama"),
]


class Counted(TorchOps):
    """TorchOps that counts its products."""

    products = 0

    def linear(self, x: torch.Tensor, w: Weights[torch.Tensor]) -> torch.Tensor:
        self.products += 1
        return super().linear(x, w)


def gradients(
    role: str, kind: str, op: Counted, plan: PrecisionPlan | None = None
) -> tuple[dict[str, torch.Tensor], int, int]:
    """Of the mean square of the outputs; products of the forward pass, and of both passes."""
    part = component(role, kind)
    weights = tensors(part)
    parameters = {k: torch.nn.Parameter(torch.from_numpy(v)) for k, v in weights.items()}
    given = {k: torch.from_numpy(v) for k, v in feed(part).items()}
    ops: Any = Quantize(op, part.name, plan, weights.__getitem__) if plan else op
    outputs = part.forward(ops, Weights(parameters), given)
    forward = op.products
    loss = torch.stack([y.square().mean() for y in outputs.values() if y.requires_grad]).sum()
    torch.autograd.backward(loss)
    found = {k: p.grad for k, p in parameters.items() if p.grad is not None}
    assert len(found) == len(parameters)
    return found, forward, op.products


@pytest.mark.parametrize(("role", "kind"), LAYERED)
def test_gradients_through_recomputed_blocks_are_the_same(role: str, kind: str) -> None:
    kept, forward, once = gradients(role, kind, Counted())
    assert once == forward
    recomputed, forward, twice = gradients(role, kind, Counted(checkpoint=True))
    assert twice > forward  # the backward pass ran the blocks again
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_a_wrapped_model_is_recomputed_too_and_rounds_the_same() -> None:
    part = component("lms", "llama")
    plan = calibrated(part, tensors(part), feed(part))
    kept, forward, once = gradients("lms", "llama", Counted(), plan)
    recomputed, _, twice = gradients("lms", "llama", Counted(checkpoint=True), plan)
    assert (once, twice > forward) == (forward, True)
    float_gradients, _, _ = gradients("lms", "llama", Counted())
    name = "layers.0.attention.q.weight"
    assert not torch.equal(kept[name], float_gradients[name])
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_without_gradients_nothing_is_kept_for_a_second_run() -> None:
    part = component("encoders", "clip")
    op = Counted(checkpoint=True)
    weights = {k: torch.from_numpy(v) for k, v in tensors(part).items()}
    given = {k: torch.from_numpy(v) for k, v in feed(part).items()}
    with torch.no_grad():
        found = part.forward(op, Weights(weights), given)
    expected = part.forward(NumpyOps(), Weights(tensors(part)), feed(part))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name].numpy(), array, atol=1e-4)


def test_a_table_is_copied_once_and_stays_float32() -> None:
    op, table = TorchOps(), np.ones((3, 2), np.float32)
    first = op.constant("rotary.cos", table)
    assert first.dtype == torch.float32
    assert op.constant("rotary.cos", table) is first
    other = op.constant("rotary.cos", 2 * table)  # another model's, under the same name
    assert other is not first
    assert float(other[0, 0]) == 2.0
