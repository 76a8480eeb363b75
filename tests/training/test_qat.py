"""Training with rounded weights: what the forward pass sees is what a bundle stores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm import api
from edgevlm.calibration import weight_only
from edgevlm.export import write
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import CalibrationError
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Weights
from edgevlm.toolkit.quantization import blockwise, channels, static
from edgevlm.toolkit.quantization.blockwise import Bits
from edgevlm.toolkit.quantization.plan import Precision, PrecisionPlan
from edgevlm.training import qat
from edgevlm.training.torch_ops import TorchOps
from tests.training import runs
from tests.training.test_original_training import loss_of, model_of, stored_batch


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [16, 96, 256, 20])
def test_rounding_is_that_of_the_stored_codes(bits: Bits, inputs: int) -> None:
    rows = np.random.default_rng(inputs).standard_normal((6, inputs)).astype(np.float32)
    rows[2] = 0
    found = qat.round_blocks(torch.from_numpy(rows), bits).numpy()
    if blockwise.block_of(inputs) is None:
        assert np.array_equal(found, rows)  # such a weight stays in float in a bundle too
        return
    expected = blockwise.dequantize(*blockwise.quantize(rows, bits), bits)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_rows_are_rounded_as_the_reference_rounds_them() -> None:
    generator = np.random.default_rng(0)
    x, weight = (generator.standard_normal(n).astype(np.float32) for n in ((3, 16), (16, 4)))
    inner: Any = TorchOps()
    ops: Any = qat.FakeQuantize(inner, "lm", PrecisionPlan("int8_rows"))
    given = torch.from_numpy(x).requires_grad_()
    found = ops.linear(given, Weights({"a.weight": torch.from_numpy(weight)}) / "a")
    steps = channels.scales(weight)
    codes = np.concatenate(list(channels.codes(weight, steps)))
    expected = channels.round_rows(x) @ channels.dequantize(codes, steps)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-5)
    torch.autograd.backward(found.sum())
    assert given.grad is not None and bool((given.grad != 0).all())


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_inputs_in_known_steps_are_rounded_as_a_bundle_does(precision: Precision) -> None:
    generator = np.random.default_rng(0)
    x, weight = (generator.standard_normal(n).astype(np.float32) for n in ((3, 16), (16, 4)))
    form = static.FORMS[precision]
    inner: Any = TorchOps()
    plan = PrecisionPlan(precision, ranges={"lm/a": 2.0})
    ops: Any = qat.FakeQuantize(inner, "lm", plan)
    given = torch.from_numpy(x).requires_grad_()
    found = ops.linear(given, Weights({"a.weight": torch.from_numpy(weight)}) / "a")
    steps = static.scales(weight, form)
    codes = np.concatenate(list(static.codes(weight, steps, form)))
    step = static.input_step(plan.ranges, "lm/a", form)
    inputs = NumpyOps().fake_quant(x, step, axis=None, path="", to=form.to)
    expected = inputs @ static.dequantize(codes, steps, form)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-5)
    torch.autograd.backward(found.sum())
    clipped = np.abs(x) > (127.5 if form.to == "int8" else 448) * step
    assert given.grad is not None
    np.testing.assert_array_equal(given.grad.numpy() == 0, clipped)


def test_gradients_pass_through_the_rounding() -> None:
    rows = torch.randn(4, 32, requires_grad=True)
    torch.autograd.backward(qat.round_blocks(rows, 4).square().sum())
    assert rows.grad is not None
    assert torch.equal(rows.grad, 2 * qat.round_blocks(rows.detach(), 4))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_loss_with_rounding_is_that_of_the_rounded_model(kind: str, tmp_path: Path) -> None:
    """The same model with its weights replaced by those that a quantized bundle holds."""
    name = "e2e_llava15"
    plan = weight_only.plan(kind)
    imitated = model_of(name, wrap=qat.wrapper(plan))
    rounded = model_of(name)
    source = systems.load(runs.checkpoint(), Options())
    quiet: Any = {"made_by": "tests", "progress": lambda message: None}
    write.write_bundle(replace(source, plan=plan), tmp_path / "bundle", **quiet)
    stored = systems.load(tmp_path / "bundle", Options())
    with torch.no_grad():
        for component, part in rounded.parts.items():
            for key in part.shapes:
                values = torch.tensor(stored.weights[component][key])
                rounded.get_parameter(f"{component}.{key}").copy_(values)
        batch = stored_batch(name)
        found, expected = loss_of(imitated, batch).item(), loss_of(rounded, batch).item()
        exact = loss_of(model_of(name), batch).item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found - exact) > 1e-4  # rounding is there


def test_a_model_trained_with_rounding_keeps_its_answers_in_4_bits(tmp_path: Path) -> None:
    data = runs.data_set(tmp_path / "data", 12)
    common: dict[str, Any] = {
        "data": [str(data)],
        "batch": 12,
        "steps": 30,
        "rate": 3e-3,
        "warmup": 0.0,
    }
    losses = {}
    both: dict[str, dict[str, Any]] = {"float": {}, "rounded": {"qat": "int4"}}
    for name, options in both.items():
        result = api.train(runs.STAGE, str(runs.checkpoint()), tmp_path / name, **common, **options)
        assert result.last_loss is not None and result.last_loss < 0.5
        model = model_of("e2e_llava15", wrap=qat.wrapper(weight_only.plan("int4")))
        losses[name] = evaluated(model, tmp_path / name, data)
    assert losses["rounded"] < losses["float"]


def evaluated(model: torch.nn.Module, trained: Path, data: Path) -> float:
    """Loss of a trained model in 4 bits on its own data."""
    from edgevlm.toolkit.text.tokenizer import Tokenizer
    from edgevlm.training.data.collate import collate
    from edgevlm.training.data.prepare import prepare, rules_for
    from edgevlm.training.data.sources import open_samples

    source = systems.load(trained, Options())
    model.load(source.weights)  # type: ignore[operator]
    rules = rules_for(source.model, max_length=512)
    rows = source.model.lm.config.vocab_size
    tokenizer = Tokenizer.from_text(source.tokenizer, source.model.prompts.sentencepiece, rows)
    samples = open_samples(data)
    assert not hasattr(samples, "stream")
    batch = collate([prepare(samples[i], rules, tokenizer) for i in range(len(samples))], rules)
    with torch.no_grad():
        return float(loss_of(model, batch))  # type: ignore[arg-type]


def test_activations_need_ranges() -> None:
    model = model_of("e2e_llava15", wrap=qat.wrapper(PrecisionPlan("int8", method="minmax")))
    with pytest.raises(CalibrationError, match="no range for the input of encoder.clip/"):
        loss_of(model, stored_batch("e2e_llava15"))
