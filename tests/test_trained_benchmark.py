"""benchmarks/trained.py, as far as it goes without downloading weights."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import (
    trained,
    trained_answers,
    trained_outliers,
    trained_remedies,
    trained_text,
    trained_tower,
)
from edgevlm.calibration.many import Many
from edgevlm.toolkit.ops.vocabulary import Weights


def test_features_are_as_near_as_their_angles() -> None:
    plain = np.asarray([[[3.0, 4.0], [1.0, 0.0]]])
    found = trained_tower.nearness(plain, np.asarray([[[4.0, 3.0], [1.0, 0.0]]]))
    assert (found.pictures, found.tokens) == (1, 2)
    assert found.mean == pytest.approx(0.98)
    assert found.least == pytest.approx(0.96)
    assert found.rms == pytest.approx((2 / 26) ** 0.5)


def test_a_classifier_of_means_separates_what_differs() -> None:
    draw = np.random.default_rng(0)
    labels = np.arange(60) % 3
    pictures = draw.standard_normal((60, 4, 5)) * 0.1
    pictures[np.arange(60), :, labels] += 1
    classes = trained_tower.Classifier(pictures, labels).classes(pictures)
    assert classes.tolist() == labels.tolist()
    other = np.where(np.arange(60) < 3, 0, classes)
    probe = trained_tower.probe(classes, other, labels)
    assert probe.accuracy == probe.same == pytest.approx(58 / 60)
    assert 0 < probe.error < 0.03


def test_an_outlier_costs_a_row_more_than_a_block() -> None:
    x = np.random.default_rng(0).standard_normal((1, 20, 64)).astype(np.float32)
    x[0, 5, 3] = 1000
    weight = np.random.default_rng(1).standard_normal((64, 8)).astype(np.float32)
    found = trained_outliers.of_linear("layers.0/mlp/up", Many([x]), weight)
    assert (found.channel, found.token) == (3, 5)
    assert found.channel_ratio > 100
    assert found.by_tensor > 0.5 > 0.02 > found.by_rows > 0


@pytest.mark.parametrize("factors", [{}, {"layers.0/mlp/up": np.full(64, 2, np.float32)}])
@pytest.mark.parametrize("blocked", [(), ("mlp/up",)])
def test_a_remedy_rounds_and_nothing_else(
    factors: trained_remedies.Factors, blocked: tuple[str, ...]
) -> None:
    x = np.random.default_rng(0).standard_normal((1, 20, 64)).astype(np.float32)
    weight = np.random.default_rng(1).standard_normal((64, 8)).astype(np.float32)
    w = Weights({"layers.0.mlp.up.weight": weight}) / "layers.0" / "mlp" / "up"
    ops = trained_remedies.Rounding(blocked, factors)
    (found,) = ops.linear(Many([x]), w)
    error = np.linalg.norm(found - x @ weight) / np.linalg.norm(x @ weight)
    assert 1e-4 < error < 0.02


@pytest.mark.parametrize("block", [None, 32])
def test_each_bit_halves_the_error_of_rounding(block: int | None) -> None:
    x = np.random.default_rng(0).standard_normal((1, 20, 64)).astype(np.float32)
    errors = [np.linalg.norm(trained_answers._rounded(x, b, block) - x) for b in (8, 9, 12)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[0] / errors[2] == pytest.approx(2**4, rel=0.1)
    alone = trained_answers._rounded(x[:, 3:4], 8, block)
    np.testing.assert_array_equal(alone, trained_answers._rounded(x, 8, block)[:, 3:4])


def test_linears_that_stay_in_float_are_not_rounded() -> None:
    x = np.random.default_rng(0).standard_normal((1, 20, 64)).astype(np.float32)
    weight = np.random.default_rng(1).standard_normal((64, 8)).astype(np.float32)
    w = Weights({"layers.0.mlp.up.weight": weight}) / "layers.0" / "mlp" / "up"
    for floats, exact in ((("up",), True), (("down",), False)):
        ops = trained_answers._Rounding(trained_answers.Bits(8, 8, floats=floats))
        (found,) = ops.linear(Many([x]), w)
        assert np.allclose(found, x @ weight, rtol=1e-5, atol=1e-5) == exact


def test_changed_answers_are_named() -> None:
    count = len(trained_text.QUESTIONS)
    assert count == 20
    said = {"float": ["yes"] * count, "int8": ["no", *["yes"] * (count - 1)]}
    assert trained.alike(said) == {"float": count, "int8": count - 1}
    (line,) = trained_text.changed(said)
    assert line == f"int8: {next(iter(trained_text.QUESTIONS))} 'yes' -> 'no'"


def test_an_answer_is_right_by_its_word() -> None:
    said = [f"It is {word.split('|')[-1]}." for word in trained_text.QUESTIONS.values()]
    assert trained_text.right(said) == 20
    assert trained_text.right([text.replace(".", "5") for text in said]) == 0
