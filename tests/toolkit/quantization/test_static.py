"""Static INT8 and FP8: steps, codes, what is stored, and what cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.toolkit.bundle import static_weights
from edgevlm.toolkit.bundle.manifest import Tensors
from edgevlm.toolkit.checkpoints.safetensors_io import (
    SafetensorsFile,
    TensorSpec,
    write_safetensors,
)
from edgevlm.toolkit.errors import BundleError, CalibrationError
from edgevlm.toolkit.ops import float8
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.quantization import row_pieces, static
from edgevlm.toolkit.quantization.static import FP8, INT8, Form, RoundInputs

SHAPES = [(40, 7), (6, 3, 2, 2)]


def drawn(shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    weight = generator.standard_normal(shape).astype(np.float32)
    weight[..., 1] *= 30
    return weight


def stored(weight: Array, form: Form) -> tuple[Array, Array]:
    steps = static.scales(weight, form)
    return np.concatenate(list(static.codes(weight, steps, form))), steps


@pytest.mark.parametrize("form", static.FORMS.values())
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_stand_for_the_nearest_values(
    shape: tuple[int, ...], form: Form, generator: np.random.Generator
) -> None:
    weight = drawn(shape, generator)
    codes, steps = stored(weight, form)
    assert codes.shape == shape
    assert steps.shape == static.scale_shape(shape, form)
    found = static.dequantize(codes, steps, form)
    if form is FP8:
        np.testing.assert_array_equal(found, float8.rounded(weight / steps) * steps)
        normal = np.abs(weight) >= 2.0**-6 * steps
        assert np.abs(found / weight - 1)[normal].max() < 1 / 16 + 1e-6  # in every channel
    else:
        axis = static.channel_axis(shape)
        along = steps.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        assert (np.abs(found - weight) <= 0.501 * along).all()
    again, same = stored(found, form)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_allclose(same, steps, rtol=1e-6)


@pytest.mark.parametrize("largest", [1.0, 3.7, 448.0, 463.9, 464.0, 464.1, 928.0, 1e5, 1e-3])
def test_a_step_of_fp8_is_the_least_power_of_two_that_holds_the_range(largest: float) -> None:
    step = float(FP8.steps(np.asarray(largest)))
    assert np.log2(step) == np.rint(np.log2(step))
    assert float(np.float16(step)) == step or step > 65504
    held = float8.rounded(np.asarray([largest / step], np.float32))[0] * step
    assert abs(held - largest) <= largest / 16  # not clipped by more than rounding
    if step > 2.0**-14:
        assert largest / (step / 2) > float8.ROUNDS_TO_LARGEST
    assert FP8.steps(np.zeros(3)).tolist() == [2.0**-14] * 3


def test_pieces_make_no_difference(
    generator: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = drawn((13, 5), generator).astype(np.float16)
    whole = [stored(weight, form) for form in static.FORMS.values()]
    monkeypatch.setattr(row_pieces, "_PIECE", 20)
    for form, pair in zip(static.FORMS.values(), whole, strict=True):
        for found, expected in zip(stored(weight, form), pair, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", static.FORMS.values())
def test_only_inputs_of_such_weights_are_rounded(
    form: Form, generator: np.random.Generator
) -> None:
    x, weight = generator.standard_normal((2, 3, 8)).astype(np.float32), np.eye(8, 4)
    step = static.input_step({"part/a": 2.0}, "part/a", form)
    ops: Any = RoundInputs(NumpyOps(), "part", {"a.weight": (step, form)})
    w = Weights({"a.weight": weight, "b.weight": weight})
    expected = NumpyOps().fake_quant(x, step, axis=None, path="", to=form.to)
    np.testing.assert_array_equal(ops.linear(x, w / "a"), expected @ weight)
    np.testing.assert_array_equal(ops.linear(x, w / "b"), x @ weight)
    assert (expected != x).any()
    with pytest.raises(CalibrationError, match="no range for the input of part/b"):
        static.input_step({}, "part/b", form)


def test_names_are_told_apart() -> None:
    assert static.split("a.weight.fp8_static") == ("a.weight", FP8, "")
    assert static.split("a.weight.int8_static.scale") == ("a.weight", INT8, ".scale")
    assert static.split("a.weight.fp8_static.input") == ("a.weight", FP8, ".input")
    assert static.split("a.weight") is static.split("a.weight.fp8_static.other") is None


# -- files that somebody else wrote ------------------------------------------------------------

Written = dict[str, tuple[str, Array]]


def file_of(path: Path, tensors: Written) -> Path:
    specs = [TensorSpec(name, dtype, a.shape) for name, (dtype, a) in tensors.items()]
    write_safetensors(path, specs, lambda spec: iter([tensors[spec.name][1]]))
    return path


def good() -> Written:
    weight = np.linspace(-2, 2, 12, dtype=np.float32).reshape(4, 3)
    codes, steps = stored(weight, FP8)
    name = "a.weight.fp8_static"
    return {
        name: ("fp8", codes),
        name + ".scale": ("fp16", steps),
        name + ".input": ("fp16", np.asarray(0.5, np.float16)),
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = Tensors(file_of(tmp_path / "w", good()))
    assert list(tensors) == ["a.weight"]
    assert tensors.shape("a.weight") == (4, 3)
    assert np.abs(tensors["a.weight"] - np.linspace(-2, 2, 12).reshape(4, 3)).max() < 2 / 16
    step, form = tensors.input_steps["a.weight"]
    assert (float(step), form) == (0.5, FP8)
    static_weights.check(SafetensorsFile(tmp_path / "w"))


def nan(tensors: Written) -> None:
    tensors["a.weight.fp8_static"][1][1, 2] = 0xFF


def zero_scale(tensors: Written) -> None:
    tensors["a.weight.fp8_static.scale"] = ("fp16", np.asarray(0, np.float16))


def infinite_step(tensors: Written) -> None:
    tensors["a.weight.fp8_static.input"] = ("fp32", np.asarray(np.inf, np.float32))


def wide_scale(tensors: Written) -> None:
    tensors["a.weight.fp8_static.scale"] = ("fp16", np.ones(3, np.float16))


def other_codes(tensors: Written) -> None:
    tensors["a.weight.fp8_static"] = ("uint8", np.ones((4, 3), np.uint8))


def stray(tensors: Written) -> None:
    tensors["b.weight"] = ("fp8", np.ones((4, 3), np.uint8))


def no_scale(tensors: Written) -> None:
    del tensors["a.weight.fp8_static.scale"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan, r"a\.weight\.fp8_static: 1 of 12 FP8 codes are NaN"),
        (zero_scale, r"a\.weight\.fp8_static\.scale .* no numbers above 0"),
        (infinite_step, r"a\.weight\.fp8_static\.input .* no numbers above 0"),
        (wide_scale, r"a\.weight\.fp8_static\.scale \(3,\)"),
        (other_codes, r"a\.weight\.fp8_static is not stored as fp8"),
        (stray, r"b\.weight is stored in FP8 without a step"),
        (no_scale, r"lacks a\.weight\.fp8_static\.scale"),
    ],
)
def test_what_is_no_weight_is_refused_by_name(
    spoil: Callable[[Written], None], message: str, tmp_path: Path
) -> None:
    tensors = good()
    spoil(tensors)
    with pytest.raises(BundleError, match=message):
        Tensors(file_of(tmp_path / "w", tensors))["a.weight"]  # the step is read at once
    if spoil not in (other_codes, no_scale, stray):  # which no graph of ours would read
        with pytest.raises(BundleError, match=message):
            static_weights.check(SafetensorsFile(tmp_path / "w"))
