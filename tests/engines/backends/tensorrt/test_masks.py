"""Masks of an answer on an engine of the oldest release, beside the processor's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgevlm import api
from edgevlm.engines.runtime.session import Question, Session
from tests.engines.backends.tensorrt.conftest import Install
from tests.systems import segmenting


@pytest.mark.parametrize("release", ["10.3.0"])
def test_masks_are_those_of_the_processor(
    release: str, with_masks: Path, install: Install, tmp_path: Path
) -> None:
    question = Question("Where?", segmenting.MLCD / "image0.png", answer="[SEG] and [SEG]")
    with Session.open(with_masks / "engine-cpu") as session:
        expected = session.answer(question)
    machine = install(release)
    engine = tmp_path / "engine"
    made = api.build_engine(with_masks / "bundle", engine, target=str(machine.target))
    assert max(made.build.kernel_differences.values()) < 1e-5
    with Session.open(engine) as session:
        found = session.answer(question)
    assert found.token_ids == expected.token_ids
    for mine, wanted in zip(found.logits, expected.logits, strict=True):
        assert np.abs(mine - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())
    assert machine.world.live == 0
