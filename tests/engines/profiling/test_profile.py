"""Profiles of engines whose images change shape, or come as several views."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm import api
from edgevlm.engines.profiling import tower
from edgevlm.engines.profiling.profile import ProfileRequest, profile, profile_all
from edgevlm.export.write import write_bundle
from edgevlm.toolkit.checkpoints.layouts.source import random_tower
from edgevlm.toolkit.errors import UnsupportedError
from tests.conftest import HERE
from tests.pipeline import engine_of, silent
from tests.towers.test_alone import tiny


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


def test_a_tower_among_others_is_refused_before_anything_is_measured(
    ready: Path, tmp_path: Path
) -> None:
    source = random_tower(tiny("clip"), 0, "clip")
    write_bundle(source, tmp_path / "bundle", made_by="tests", progress=silent)
    api.build_engine(tmp_path / "bundle", tmp_path / "tower")
    told: list[str] = []
    for both in ([ready / "engine-cpu", tmp_path / "tower"], [tmp_path / "tower"] * 2):
        with pytest.raises(UnsupportedError, match="is a vision tower by itself"):
            profile_all(both, ProfileRequest(runs=1), told.append)
    with pytest.raises(UnsupportedError, match="with a language model"):
        tower.profile_all([tmp_path / "tower", ready / "engine-cpu"], ProfileRequest(), told.append)
    assert told == []
