"""Paths and small helpers that the tests share."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from edgevlm.engines.lowering.capabilities import reads_opset_23_only
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.target import this_cpu

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared"


def golden_cases() -> dict[str, Path]:
    """Golden folders: the copies in tests/goldens, and all others if they are at hand."""
    found: dict[str, Path] = {}
    for place in (SHARED / "goldens", HERE / "goldens"):
        if place.is_dir():
            found |= {case.name: case for case in sorted(place.iterdir()) if case.is_dir()}
    return found


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Path:
    """The golden folder named by the test's parameter; skipped where it is not on this machine."""
    cases = golden_cases()
    if request.param not in cases:
        pytest.skip(f"golden case {request.param} is not here (it is not part of the project)")
    return cases[request.param]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """Python 3.10 has ONNX Runtime 1.23 only: a test that meets a graph beyond it is skipped."""
    try:
        return (yield)
    except Exception as raised:
        lacking = isinstance(raised, UnsupportedError) or "onnxruntime" in type(raised).__module__
        if not (lacking and reads_opset_23_only(this_cpu())):
            raise
        pytest.skip(f"ONNX Runtime 1.23: {str(raised).splitlines()[0]}")


@pytest.fixture
def generator() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bundle` and `engine-cpu` of the tiny LLaVA-1.5; not to be changed."""
    from tests.pipeline import engine_of

    folder = tmp_path_factory.mktemp("ready")
    engine_of(HERE / "goldens/e2e_llava15/llava-v1.5-tiny", folder)
    return folder
