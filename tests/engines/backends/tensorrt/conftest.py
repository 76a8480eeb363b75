"""Machines with a stood-in release and card, and engines built on them, each once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgevlm import api
from tests.conftest import HERE
from tests.engines.backends.tensorrt.machine import Machine, installed

GOLDEN = HERE / "goldens/e2e_llava15"
Install = Callable[[str], Machine]
Built = Callable[[str], Path]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Makes this machine one with a release and its card, with memory that nothing has used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda release: installed(release, monkeypatch, tmp_path / "packages")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The engine of the tiny LLaVA-1.5 for a release, built and compared on its machine."""
    folder = tmp_path_factory.mktemp("tensorrt")

    def made(release: str) -> Path:
        bundle, engine = folder / "bundle", folder / release
        if not bundle.exists():
            api.export_bundle(GOLDEN / "llava-v1.5-tiny", bundle, dtype="fp32")
        if not engine.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
                machine = installed(release, patch, folder / f"packages-{release}")
                found = api.build_engine(bundle, engine, target=str(machine.target))
                assert found.verified
                assert max(found.build.kernel_differences.values()) < 1e-5
                assert machine.world.live == 0
        return engine

    return made
