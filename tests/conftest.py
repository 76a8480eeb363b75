"""Paths and fixtures that the tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
PACKAGES = ("toolkit", "export", "engines", "training", "calibration")
LOOSE = ("__init__.py", "api.py", "cli.py", "py.typed")
PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE")


def golden_cases() -> dict[str, Path]:
    """Golden folders by name: those of tests/goldens, and larger ones where they exist."""
    cases: dict[str, Path] = {}
    for folder in (SHARED / "goldens", HERE / "goldens"):
        if folder.is_dir():
            cases |= {case.name: case for case in sorted(folder.iterdir()) if case.is_dir()}
    return cases


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


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy, so that the checkout stays as it is."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PROJECT_FILES, *LOOSE, *PACKAGES):
        if (ROOT / name).is_dir():
            junk = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(ROOT / name, copy / name, ignore=junk)
        else:
            shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("edgevlm-*.whl"))


@pytest.fixture
def generator() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bundle` and `engine-cpu` of the tiny LLaVA-1.5; tests only read it."""
    from tests.pipeline import engine_of

    folder = tmp_path_factory.mktemp("ready")
    engine_of(HERE / "goldens/e2e_llava15/llava-v1.5-tiny", folder)
    return folder
