"""A build tells two things apart, kernels and precision, and refuses what either costs too much."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgevlm import api
from edgevlm.calibration import weight_only
from edgevlm.engines import manifest
from edgevlm.engines.build import check
from edgevlm.engines.build.build import Request, build
from edgevlm.engines.runtime.session import Session
from edgevlm.export import write
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.goldens import Golden, centered, relative_rms, sampled
from edgevlm.toolkit.bundle.manifest import (
    GOLDENS,
    MANIFEST,
    read_manifest,
    record_file,
    write_manifest,
)
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import AccuracyError, BundleError, ConfigError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule
from edgevlm.toolkit.target import parse, this_cpu
from tests.conftest import HERE
from tests.pipeline import engine_of, requantized, silent

CHECKPOINT = HERE / "goldens/e2e_llava15/llava-v1.5-tiny"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float bundle."""
    work = tmp_path_factory.mktemp("float")
    engine_of(CHECKPOINT, work)
    return work / "bundle"


# -- the two figures ---------------------------------------------------------------------------


def test_a_float_build_reports_kernels_only(bundle: Path) -> None:
    made = manifest.read(bundle.parent / "engine-cpu")
    assert set(made.build.kernel_differences) == {"encoder.clip", "merger", "lm"}
    assert max(made.build.kernel_differences.values()) < 1e-5
    assert made.build.precision_losses == {}
    assert made.build.accepted_loss is None


def test_eight_bits_pass_by_themselves_and_cost_more_than_their_kernels(
    bundle: Path, tmp_path: Path
) -> None:
    made, _ = build(bundle, tmp_path / "e", requantized(bundle, "int8", gated=True), silent)
    assert set(made.build.precision_losses) == set(made.build.kernel_differences)
    for loss in made.build.precision_losses.values():
        assert 1e-3 < loss < 0.1
    request = requantized(bundle, "int8", parse("reference"), gated=True)
    plain, _ = build(bundle, tmp_path / "r", request, silent)
    assert max(plain.build.kernel_differences.values()) < 1e-6  # it is the reference
    assert min(plain.build.precision_losses.values()) > 1e-3


def test_a_quantized_bundle_keeps_the_float_answers_of_its_origin(
    bundle: Path, tmp_path: Path
) -> None:
    def written(name: str, origin: Path, plan: PrecisionPlan) -> list[Golden]:
        source = replace(systems.load(origin, Options()), plan=plan)
        write.write_bundle(source, tmp_path / name, made_by="tests", progress=silent)
        return goldens.load(tmp_path / name / GOLDENS)

    floats = goldens.load(bundle / GOLDENS)
    eight = written("eight", bundle, weight_only.plan("int8"))
    four = written("four", tmp_path / "eight", weight_only.plan("int4"))
    straight = written("straight", CHECKPOINT, weight_only.plan("int8"))
    assert all(not golden.float_outputs for golden in floats)
    for first, *others in zip(floats, eight, four, straight, strict=True):
        for other in others:
            for name, values in first.outputs.items():
                size = np.abs(values).max()
                same, own = other.float_outputs[name], other.outputs[name]
                np.testing.assert_allclose(same, values, atol=1e-5 * size, rtol=0)
                assert np.abs(own - values).max() > 1e-3 * size


def test_a_quantized_bundle_without_the_float_answers_is_refused(
    bundle: Path, tmp_path: Path
) -> None:
    source = replace(systems.load(bundle, Options()), plan=weight_only.plan("int8"))
    write.write_bundle(source, tmp_path / "b", made_by="tests", progress=silent)
    path = tmp_path / "b" / GOLDENS
    goldens.save(path, [replace(golden, float_outputs={}) for golden in goldens.load(path)])
    made = read_manifest(tmp_path / "b" / MANIFEST)
    files = {**made.files, GOLDENS: record_file(path)}
    write_manifest(tmp_path / "b", replace(made, files=files))
    with pytest.raises(BundleError, match="lacks the float model's answers"):
        build(tmp_path / "b", tmp_path / "e", Request(this_cpu(), None, False, "t"), silent)


# -- refused, accepted, recorded ---------------------------------------------------------------


def test_four_bits_of_random_weights_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(AccuracyError, match="lm in this precision differs") as caught:
        build(bundle, tmp_path / "e", requantized(bundle, "int4", gated=True), silent)
    assert "allowed 0.2" in caught.value.message
    assert not (tmp_path / "e").exists()
    offered = re.search(r"--accept-loss ([0-9.]+)", caught.value.hint)
    assert offered is not None
    accepted = float(offered[1])
    made = api.build_engine(bundle, tmp_path / "e", precision="int4-blocks", accept_loss=accepted)
    on_disk = json.loads((tmp_path / "e/engine.json").read_text())["build"]
    assert on_disk["accepted_loss"] == accepted
    assert 0.2 < on_disk["precision_losses"]["lm"] <= accepted
    assert f"--precision int4-blocks --accept-loss {accepted:g}" in made.rebuild_command(
        tmp_path / "e"
    )


def test_an_engine_that_was_accepted_is_not_kept_for_a_stricter_build(
    bundle: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "e"
    build(bundle, engine, requantized(bundle, "int4"), silent)
    assert build(bundle, engine, requantized(bundle, "int4"), silent)[1] is False
    strict = replace(requantized(bundle, "int4", gated=True), force=True)
    with pytest.raises(AccuracyError):
        build(bundle, engine, strict, silent)
    Session.open(engine).close()  # the old engine stands as it was


def zeroed(rows: Array, bits: blockwise.Bits, most: int | None = None) -> tuple[Array, Array]:
    stored, scales = QUANTIZE(rows, bits, most)
    return stored, np.zeros_like(scales)


QUANTIZE = blockwise.quantize


@pytest.mark.parametrize("kind", weight_only.KINDS)
def test_zeroed_scales_fail(
    kind: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "quantize", zeroed)
    with pytest.raises(AccuracyError, match=r"encoder\.clip in this precision"):
        build(bundle, tmp_path / "e", requantized(bundle, kind, gated=True), silent)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("accept", [0.0, -1.0, float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused(accept: float) -> None:
    with pytest.raises(ConfigError, match="not a number above 0"):
        check.allowed_loss(weight_only.plan("int8"), accept)


def test_accepting_a_loss_that_cannot_be_is_refused(bundle: Path, tmp_path: Path) -> None:
    request = Request(this_cpu(), None, False, "tests", accept_loss=0.5)
    with pytest.raises(ConfigError, match="no weight is rounded") as caught:
        build(bundle, tmp_path / "e", request, silent)
    assert "--precision" in caught.value.hint


def test_the_limit_is_that_of_the_least_precise_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_LOSS", {"int8_weights": 0.1, "int4_weights": 0.3})
    assert check.allowed_loss(PrecisionPlan(), None) == 0.0
    assert check.allowed_loss(PrecisionPlan("int8_weights"), None) == 0.1
    mixed = PrecisionPlan("int8_weights", (Rule("lm/*", "int4_weights"),))
    assert check.allowed_loss(mixed, None) == 0.3
    assert check.allowed_loss(mixed, 0.7) == 0.7


# -- the measure -------------------------------------------------------------------------------


def test_the_measure_is_the_root_of_the_mean_square() -> None:
    pairs = [(np.array([1.0, 2.0]), np.array([1.0, 1.0])), (np.array([5.0]), np.array([3.0]))]
    assert relative_rms(pairs) == pytest.approx(np.sqrt((1 + 4) / (1 + 1 + 9)))
    assert relative_rms([(np.array([np.nan]), np.array([1.0]))]) == float("inf")
    assert relative_rms([(np.zeros(2), np.zeros(3))]) == float("inf")


def test_a_constant_on_a_row_of_logits_is_no_difference(generator: np.random.Generator) -> None:
    logits = generator.standard_normal((1, 3, 50_000))  # more than are kept
    moved = logits + np.array([100.0, -7.0, 0.5])[None, :, None]
    found, expected = (centered(sampled(x), x.shape) for x in (moved, logits))
    assert found.size == 1 << 16
    assert relative_rms([(found, expected)]) < 1e-5
    assert relative_rms([(sampled(moved), sampled(logits))]) > 10
    np.testing.assert_allclose(expected.reshape(-1)[:100], sampled(logits)[:100], atol=0.05)
