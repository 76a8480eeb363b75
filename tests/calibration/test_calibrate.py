"""calibrate: a float bundle and a text give a quantized bundle, which builds and answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from edgevlm import api, cli
from edgevlm.calibration import calibrate as calibration
from edgevlm.calibration import samples
from edgevlm.calibration.many import ManyOps, hidden
from edgevlm.calibration.quality import Quality, compare
from edgevlm.engines.build.check import TOLERANCE
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.goldens import relative_difference
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.errors import BundleError, CalibrationError, ConfigError, OutputError
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Weights
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule
from edgevlm.toolkit.strict import from_plain
from edgevlm.toolkit.vlm.components import lm_component, zero_states
from edgevlm.toolkit.vlm.cost import stored_bytes
from tests.conftest import HERE
from tests.pipeline import LOSS_IN_4_BITS, engine_of
from tests.systems.test_same_answer import replayed

GOLDEN = HERE / "goldens/e2e_llava15"
TEXT = Path(__file__)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("float")
    engine_of(GOLDEN / "llava-v1.5-tiny", work)
    return work / "bundle"


def calibrated(bundle: Path, out: Path, **changes: object) -> calibration.Calibration:
    options = {"text": TEXT, "window": 24, "windows": 12, "budget": 1e-9, **changes}
    found = api.calibrate(bundle, out, **options)  # type: ignore[arg-type]
    assert isinstance(found, calibration.Calibration)
    return found


@pytest.mark.parametrize(
    ("block", "zero_points", "method"),
    [
        *((block, False, "gptq") for block in samples.BLOCKS),
        (32, True, "awq+gptq"),
        *((32, False, method) for method in ("rtn", "awq")),
    ],
)
def test_what_was_computed_is_what_is_stored_and_run(
    block: int, zero_points: bool, method: str, bundle: Path, tmp_path: Path
) -> None:
    options = {"block": block, "zero_points": zero_points, "method": method}
    found = calibrated(bundle, tmp_path / "b", **options)
    in_4 = [codes.storage for codes in found.codes.values() if codes.storage.bits == 4]
    assert any(storage.zero_points for storage in in_4) == zero_points
    written = Bundle.open(tmp_path / "b")
    stored = written.tensors("lm")
    for key, codes in found.codes.items():
        as_stored = stored.codes(key)
        assert as_stored is not None
        assert np.array_equal(as_stored.codes, codes.codes)
        assert np.array_equal(as_stored.scales, codes.scales)
    assert written.manifest.plan == found.plan
    assert (found.plan.method, found.plan.samples) == (method, 12)
    kinds = [golden.component for golden in goldens.load(written.path / "golden.npz")]
    for kind, (actual, expected) in zip(kinds, replayed(written), strict=True):
        # Inputs rounded by rows: a value between two steps may be rounded to the other one.
        limit = TOLERANCE["fp32"] if kind == "lm" else 1e-2
        assert relative_difference(actual, expected) < limit, kind
    assert {found.plan.at(f"{kind}/x") for kind in kinds if kind != "lm"} == {"int8_rows"}
    graph = onnx.load(str(tmp_path / "b/lm.onnx"), load_external_data=False).graph
    sizes = {
        (a.i, next(b.i for b in n.attribute if b.name == "bits"))
        for n in graph.node
        if n.op_type == "BlockedLinear"
        for a in n.attribute
        if a.name == "block_size"
    }
    assert max(size for size, bits in sizes if bits == 4) <= block
    nbytes = sum(e.nbytes for e in stored._file.entries.values())
    assert stored_bytes(written.model, found.plan, 4)["lm"] == nbytes


def test_it_builds_and_answers_as_it_is(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = iter([Quality(10, 1.0, worse, 0.1, 0.5) for worse in (4.0, 3.0, 2.0)])
    monkeypatch.setattr(calibration, "compare", lambda *given: next(growing))
    found = calibrated(bundle, tmp_path / "b")
    assert not found.within_budget
    assert found.share_4_bits >= 0.7
    assert {layer.bits for layer in found.layers} == {4, 8}
    made = api.build_engine(tmp_path / "b", tmp_path / "e", accept_loss=LOSS_IN_4_BITS)
    assert made.plan == found.plan
    assert max(made.build.kernel_differences.values()) < TOLERANCE["int8"]
    with Session.open(tmp_path / "e") as session:
        question = Question("What is in the image?", [GOLDEN / "image.png"], 8)
        assert len(session.answer(question).token_ids) == 8
    api.export_bundle(tmp_path / "b", tmp_path / "again")
    one, two = (Bundle.open(tmp_path / name).tensors("lm") for name in ("b", "again"))
    for key in found.codes:
        assert np.array_equal(one[key], two[key])


def test_the_verb_says_what_it_costs(bundle: Path, tmp_path: Path) -> None:
    """Size, drift and share of every component, answers, and times where they are asked for."""
    words = ["calibrate", bundle, tmp_path / "b", "--text", TEXT, "--window", 24, "--windows", 8]
    words += ["--method", "rtn", "--budget", 9, "--measure", "--report", tmp_path / "r.json"]
    ran = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert ran.exit_code == 0, ran.output
    assert "answers of 16 tokens as in float" in ran.output
    data = json.loads((tmp_path / "r.json").read_text())
    parts = {part["name"]: part for part in data["components"]}
    for part in parts.values():
        assert part["bytes_after"] < part["bytes_before"]
        assert 0.5 < part["cosine"] < 1
        assert part["relative_rms"] > 1e-3
    assert parts["lm"]["share"] > 0.8
    assert parts["lm"]["cosine"] < parts["encoder.clip"]["cosine"]
    kept = goldens.load(tmp_path / "b/golden.npz")
    (one,) = (golden for golden in kept if golden.component == "merger")
    a, b = one.float_outputs["features"], one.outputs["features"]
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert parts["merger"]["cosine"] == pytest.approx(float(cosine), abs=1e-6)
    assert data["answers"]["prompts"] == 8
    assert {(x["component"], x["call"]) for x in data["latency"]} >= {("lm", "token")}
    assert all(x["before_ms"] > 0 and x["after_ms"] > 0 for x in data["latency"])


def test_eight_bits_cost_little(bundle: Path, tmp_path: Path) -> None:
    found = calibrated(bundle, tmp_path / "b", to="int8", budget=0.05)
    assert found.within_budget
    assert found.answers.same_tokens > 8
    assert found.quality.same_top_1 > 0.8
    assert found.share_4_bits == 0


def test_many_samples_give_what_each_gives(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    lm, weights = lm_component(opened.vlm.lm), opened.tensors("lm")
    windows = np.arange(36).reshape(3, 12) % 50
    states = hidden(lm, ManyOps(), weights, windows)
    quality = compare(lm, weights, weights, windows, lambda message: None)
    assert (quality.kl, quality.same_top_1, quality.growth) == (0, 1, 0)
    inputs = {
        "ids": windows[1:2],
        "rows": np.full((1, 12), -1),
        "features": np.zeros((1, opened.vlm.lm.config.hidden_size), np.float32),
        "start": np.zeros(1, np.int64),
        "score": np.arange(12)[None],
        **zero_states(lm.inputs, lm.outputs, {"batch": 1, "context": 12}),
    }
    expected = lm.forward(NumpyOps(), Weights(weights), inputs)["logits"]
    w, op = Weights(weights), NumpyOps()
    tied = "head.weight" not in lm.shapes
    found = op.unembed(states[1], w / "embed") if tied else op.linear(states[1], w / "head")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused(bundle: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    out = tmp_path / "b"
    with pytest.raises(CalibrationError, match="at least 4 are needed"):
        calibrated(bundle, out, text=short)
    for changes, message in (
        ({"to": "int3"}, "--to 'int3'"),
        ({"block": 16}, "--block 16"),
        ({"method": "spqr"}, "--method 'spqr'"),
        ({"method": "awq", "to": "int8"}, "--method has no meaning for --to int8"),
        ({"block": 64, "to": "int8"}, "--block has no meaning for --to int8"),
        ({"budget": 0.0}, "--budget 0.0"),
        ({"window": 100_000}, "--window 100000"),
        ({"windows": 1}, "--windows 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibrated(bundle, out, **changes)
    short.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CalibrationError, match="UTF-8"):
        calibrated(bundle, out, text=short)
    assert not out.exists()
    out.mkdir()
    (out / "file").write_text("mine")
    with pytest.raises(OutputError):
        calibrated(bundle, out)
    with pytest.raises(BundleError):
        calibrated(tmp_path, tmp_path / "c")


def test_older_plans_are_read() -> None:
    old = {"default": "int8_weights", "rules": [{"paths": "lm/*", "precision": "int4_weights"}]}
    plan = from_plain(PrecisionPlan, json.loads(json.dumps(old)), "plan")
    assert plan.rules == (Rule("lm/*", "int4_weights", None),)
    assert plan.block_at("lm/layers.0/mlp/up") is None
    with pytest.raises(ConfigError, match="block = 48"):
        from_plain(Rule, {"paths": "*", "precision": "int4_weights", "block": 48}, "rule")
