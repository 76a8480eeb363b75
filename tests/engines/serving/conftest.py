"""Engines that the tests of serving share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgevlm.engines.build.build import build
from edgevlm.engines.runtime.session import Session
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


@pytest.fixture
def session(engine: Path) -> Iterator[Session]:
    with Session.open(engine, threads=1) as opened:
        yield opened
