"""Engines that the tests of serving share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevlm import api
from edgevlm.engines.build.build import build
from edgevlm.engines.runtime.session import Session
from edgevlm.export.write import write_bundle
from edgevlm.toolkit.checkpoints.layouts.source import random_tower
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.models.encoders import clip
from edgevlm.toolkit.vlm.config import ComponentConfig
from edgevlm.toolkit.vlm.presets import clip_pixels
from edgevlm.toolkit.vlm.towers import TowerConfig
from tests.conftest import HERE
from tests.pipeline import engine_of, requantized, silent

GOLDEN = HERE / "goldens/e2e_llava15"


@pytest.fixture(scope="package")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA-1.5 in float32."""
    return engine_of(GOLDEN / "llava-v1.5-tiny", tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="package")
def rounded(engine: Path) -> Path:
    """The same with 8-bit weights and rows, whose kernels round a lone row in their own way."""
    out = engine.parent / "engine-rows"
    build(engine.parent / "bundle", out, requantized(engine.parent / "bundle", "int8-rows"), silent)
    return out


@pytest.fixture(scope="package")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP by itself."""
    work, images = tmp_path_factory.mktemp("tower"), ImageRules({"clip": clip_pixels(28)})
    encoder = ComponentConfig("clip", "clip", clip.tiny())
    source = random_tower(TowerConfig("tiny", "clip", encoder, "class", images), 0, "tiny")
    write_bundle(source, work / "bundle", made_by="tests", progress=silent)
    api.build_engine(work / "bundle", work / "engine")
    return work / "engine"


@pytest.fixture
def photos(tmp_path: Path, generator: np.random.Generator) -> list[Path]:
    """Seven pictures of different sizes in a folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    files = [folder / f"{number}.png" for number in range(7)]
    for number, file in enumerate(files):
        pixels = generator.integers(0, 256, (40, 30 + number, 3), np.uint8)
        Image.fromarray(pixels).save(file)
    return files


@pytest.fixture
def session(engine: Path) -> Iterator[Session]:
    with Session.open(engine, threads=1) as opened:
        yield opened
