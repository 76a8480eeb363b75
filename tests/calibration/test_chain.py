"""Samples see what a session shows a model: the same features, the same prompt, the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgevlm import api
from edgevlm.calibration.chain import Chain, Passage, in_numpy
from edgevlm.calibration.pictures import Sample
from edgevlm.calibration.static import StaticCalibration
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.goldens import relative_difference
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.images import decode
from edgevlm.toolkit.text import prompts
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
