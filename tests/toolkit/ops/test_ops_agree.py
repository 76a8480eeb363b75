"""Tier 1: every op gives the same in NumPy, torch and ONNX: body kept, inlined, lowered."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch

from edgevlm.engines.lowering.lower import check_allowed, decide, lower
from edgevlm.toolkit.ops.shape_ops import ShapeOps, Spec, Specs
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Weights
from edgevlm.toolkit.target import this_cpu
from edgevlm.training.torch_ops import TorchOps
from tests.onnx_tools import model_of, run
from tests.ops_cases import CASES, Case

NAMES = sorted(CASES)


def close(found: dict[str, Array], expected: dict[str, Array], tolerance: float = 2e-6) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        scale = np.abs(array).max()
        np.testing.assert_allclose(found[name], array, atol=tolerance * max(scale, 1.0), rtol=0)


def test_every_op_has_a_case() -> None:
    ops = {name for name in vars(Ops) if not name.startswith("_")}
    called = set()
    for case in CASES.values():
        called |= calls(case)
    assert ops - called == set()


def calls(case: Case) -> set[str]:
    """The ops that a case calls, seen by a spy around the reference."""
    from edgevlm.toolkit.ops.numpy_ops import NumpyOps
    from edgevlm.toolkit.ops.wrappers import Wrapper

    seen: set[str] = set()

    class Spy(Wrapper[Array]):
        def __getattribute__(self, name: str) -> object:
            if name in vars(NumpyOps):
                seen.add(name)
                return getattr(NumpyOps(), name)
            return super().__getattribute__(name)

    spy: Any = Spy(NumpyOps(), "case")
    case.body(spy, Weights(case.weights()), case.feed())
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_torch(name: str) -> None:
    case = CASES[name]
    tensors = {k: torch.from_numpy(v) for k, v in case.weights().items()}
    feed = {k: torch.from_numpy(v) for k, v in case.feed().items()}
    found = case.component().forward(TorchOps(), Weights(tensors), feed)
    close({k: v.numpy() for k, v in found.items()}, case.outputs())


@pytest.mark.parametrize("name", NAMES)
def test_shapes(name: str) -> None:
    case = CASES[name]
    feed = {k: Spec(v.shape) for k, v in case.feed().items()}
    found = case.component().forward(ShapeOps(), Weights(Specs(case.shapes)), feed)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in case.outputs().items()}


@pytest.mark.parametrize("name", NAMES)
def test_onnx_with_its_function_bodies(name: str) -> None:
    case = CASES[name]
    model = model_of(case.component(), case.weights())
    close(run(model, case.feed()), case.outputs())


@pytest.mark.parametrize("name", NAMES)
def test_onnx_inlined(name: str) -> None:
    case = CASES[name]
    model = onnx.inliner.inline_local_functions(model_of(case.component(), case.weights()))
    assert not model.functions
    close(run(model, case.feed()), case.outputs())


@pytest.mark.parametrize("name", NAMES)
def test_onnx_lowered_for_this_processor(name: str) -> None:
    case, target = CASES[name], this_cpu()
    model = model_of(case.component(), case.weights())
    decide("case", model, target)
    model = lower(model, target)
    check_allowed("case", model, target)
    assert not model.functions
    found, expected = run(model, case.feed()), case.outputs()
    for output, rows in case.matters.items():  # beyond these a cache holds what it likes
        found[output], expected[output] = found[output] * rows, expected[output] * rows
    close(found, expected)


def test_fake_quant_lets_gradients_pass_where_nothing_is_clipped() -> None:
    x = torch.tensor([0.5, -0.3, 9.0], requires_grad=True)
    scale = np.asarray(0.05, np.float32)
    y = TorchOps().fake_quant(x, scale, axis=None, path="s")
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0]
