"""Profiles of engines whose images change shape, or come as several views."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.engines.profiling.profile import ProfileRequest, profile
from tests.conftest import HERE
from tests.pipeline import engine_of, silent


@pytest.mark.parametrize(
    ("checkpoint", "encoder", "views"),
    [("e2e_convllava/convllava-tiny", "convnext", 1), ("mlcd_llavanext_e2e", "mlcd", 5)],
)
def test_every_stage_has_a_floor(checkpoint: str, encoder: str, views: int, tmp_path: Path) -> None:
    engine = engine_of(HERE / "goldens" / checkpoint, tmp_path)
    result = profile(engine, ProfileRequest(runs=1, warmup=0, max_tokens=3), silent)
    bounds = {bound.stage: bound for bound in result.roofline.stages}
    assert set(bounds) == {f"encoder.{encoder}", "merger", "prefill", "decode"}
    assert all(bound.floor_ms > 0 for bound in bounds.values())
    assert sum(span.stage == f"encoder.{encoder}" for span in result.spans) == views
    assert result.image_tokens > 0
