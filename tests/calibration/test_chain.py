"""Samples see what a session shows a model: the same features, the same prompt, the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgevlm import api
from edgevlm.calibration.chain import Chain, Passage, in_numpy
from edgevlm.calibration.pictures import Sample
from edgevlm.calibration.samples import Settings
from edgevlm.calibration.static import StaticCalibration
from edgevlm.calibration.static_plan import layers_of, plan_of
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.goldens import relative_difference
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.images import decode, longest_side
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.vlm.components import MASK_DECODER, MASK_ENCODER
from tests.calibration.test_static import draw
from tests.conftest import HERE
from tests.pipeline import engine_of
from tests.systems import test_comm, test_next_variants


def variant(name: str) -> Callable[[Path], Path]:
    """A checkpoint of LLaVA-NeXT: tiles, tokens pooled in a component of their own, ..."""

    def write(work: Path) -> Path:
        test_next_variants.write(work, test_next_variants.VARIANTS[name])
        return work / "checkpoint"

    return write


def comm(work: Path) -> Path:
    """Two encoders, of several levels each."""
    test_comm.write(work / "comm")
    return work / "comm"


WRITERS: dict[str, Callable[[Path], Path]] = {
    "llava": lambda work: HERE / "goldens/e2e_llava15/llava-v1.5-tiny",
    "mlcd": lambda work: HERE / "goldens/mlcd_llavanext_e2e",
    "comm": comm,
    "pooled tiles": variant("pooled"),
    "convolutions in the merger": variant("pooler"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_sample_is_what_a_session_shows(name: str, tmp_path: Path) -> None:
    engine = engine_of(WRITERS[name](tmp_path), tmp_path)
    image = draw(tmp_path / "images", 5) / "04.png"
    bundle = Bundle.open(tmp_path / "bundle")
    weights = systems.load(tmp_path / "bundle", Options()).weights
    chain = Chain(bundle.vlm, bundle.tokenizer())
    found = chain.run(Sample(image, "What is this?"), Passage(weights, in_numpy()))
    source, port = chain._sources[f"{bundle.vlm.lm.name}:features"].split(":")
    with Session.open(engine) as session:
        loaded = decode.load(image, upright=bundle.vlm.images.upright)
        features = session.encode([loaded], Clock())
        assert relative_difference(found[source][port], features.rows) < 1e-4
        rules = bundle.vlm.prompts
        rendered = prompts.render(rules, ["What is this?"], 1, "auto")
        prompt = prompts.tokenize(rules, session.tokenizer, rendered)
        sequence = prompts.assemble(prompt, features.indices)
        logits = session.prefill(sequence, features.rows, session.new_state())
    last = found[bundle.vlm.lm.name]["logits"][0, -1]
    assert relative_difference(last, np.asarray(logits)) < 1e-4
    expected = {p.name for p in chain.parts}
    assert set(found) == expected

    result = api.calibrate(
        tmp_path / "bundle", tmp_path / "q", images=tmp_path / "images", to="int8-static"
    )
    assert isinstance(result, StaticCalibration)
    assert {cost.name for cost in result.components} == expected
    made = api.build_engine(tmp_path / "q", tmp_path / "e", accept_loss=0.5)
    assert max(made.build.kernel_differences.values()) < 1e-3


def test_the_encoder_of_masks_sees_its_own_pixels_and_their_decoder_stays_in_float(
    with_masks: Path, tmp_path: Path
) -> None:
    image = draw(tmp_path / "images", 5) / "04.png"
    bundle = Bundle.open(with_masks / "bundle")
    weights = systems.load(with_masks / "bundle", Options()).weights
    chain = Chain(bundle.vlm, bundle.tokenizer())
    found = chain.run(Sample(image, "Where?"), Passage(weights, in_numpy()))
    segmenter = bundle.vlm.segmenter
    assert segmenter is not None
    with Session.open(with_masks / "engine-cpu") as session:
        rgb = decode.load(image).rgb
        pixels = longest_side.preprocess(rgb, segmenter.pixels)[None]
        features = session._runners[MASK_ENCODER].run({"pixels": pixels})
    for port, array in features.items():
        assert relative_difference(found[MASK_ENCODER][port], array) < 1e-4
    assert MASK_DECODER not in found
    layers, plan = layers_of(bundle.vlm), plan_of(bundle.vlm, Settings("int8-static"))
    kinds = {path.split("/")[0]: plan.at(path) for path in layers.flops if "head" not in path}
    assert kinds[MASK_ENCODER] == kinds["encoder.mlcd"] == "int8"
    assert kinds[MASK_DECODER] == "float"


def test_masks_of_int8_are_those_of_float_where_logits_are_clear(
    with_masks: Path, tmp_path: Path
) -> None:
    """Static INT8 and 8-bit rows, through SAM's windows and neck: masks of a forced answer."""
    folder, image = draw(tmp_path / "images", 9), tmp_path / "images/03.png"
    bundle = with_masks / "bundle"
    found = api.calibrate(bundle, tmp_path / "q", images=folder, to="int8-static", smooth=0.5)
    assert isinstance(found, StaticCalibration)
    assert found.mask_iou is not None
    assert found.mask_iou > 0.9
    named = {cost.name: cost for cost in found.components}
    assert named[MASK_ENCODER].share > 0.8
    assert named[MASK_DECODER].share == 0
    assert named[MASK_DECODER].cosine > 0.99
    assert f"{MASK_ENCODER}/neck/2" in found.plan.ranges
    api.build_engine(tmp_path / "q", tmp_path / "static", accept_loss=0.5)
    api.build_engine(bundle, tmp_path / "rows", precision="int8-rows", keep_slower=True)
    question = Question("Where is it?", [image], answer="[SEG]")
    masks = []
    for engine in (with_masks / "engine-cpu", tmp_path / "static", tmp_path / "rows"):
        with Session.open(engine) as session:
            answer = session.answer(question)
            masks.append((answer.logits[0], answer.masks[0]))
    (plain, whole), *others = masks
    clear = np.abs(plain) > 0.1 * np.abs(plain).max()
    assert clear.mean() > 0.3
    for _, mask in others:
        assert np.array_equal(mask[clear], whole[clear])
        assert (mask & whole).sum() / (mask | whole).sum() > 0.9
