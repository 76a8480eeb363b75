"""A vision tower by itself on engines of both products: batches of any size up to the profile's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgevlm import api
from edgevlm.engines.runtime.embedding import Embedder
from edgevlm.export.write import write_bundle
from edgevlm.toolkit.checkpoints.layouts.source import random_tower
from tests.engines.backends.tensorrt.conftest import Install
from tests.towers.test_alone import tiny


@pytest.mark.parametrize(("release", "kind"), [("10.3.0", "unicom"), ("rtx-1.7.1.116", "mlcd")])
def test_a_tower_embeds_in_batches(
    release: str, kind: str, install: Install, tmp_path: Path, generator: np.random.Generator
) -> None:
    source = random_tower(tiny(kind), 0, kind)
    write_bundle(source, tmp_path / "bundle", made_by="tests", progress=lambda line: None)
    api.build_engine(tmp_path / "bundle", tmp_path / "cpu")
    pixels = generator.standard_normal((5, 3, *source.model.pixels)).astype(np.float32)
    with Embedder.open(tmp_path / "cpu") as tower:
        expected = tower.run(pixels)
    machine = install(release)
    api.build_engine(tmp_path / "bundle", tmp_path / "engine", target=str(machine.target))
    with Embedder.open(tmp_path / "engine") as tower:
        for count in (1, 5, 2):
            np.testing.assert_allclose(tower.run(pixels[:count]), expected[:count], atol=1e-4)
    assert machine.world.live == 0
