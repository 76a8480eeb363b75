"""Paths and fixtures that the tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from edgevlm.engines.lowering import capabilities
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.target import this_cpu

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Builds keep there what they time; the user's own timings stay out of tests, and theirs out of his.
_CACHE = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="edgevlm-tests-")

HERE = Path(__file__).parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared"
PACKAGES = ("toolkit", "export", "engines", "training", "calibration")
LOOSE = ("__init__.py", "api.py", "cli.py", "requantize.py", "sizing.py", "py.typed")
PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE")


def pytest_unconfigure() -> None:
    """In every process of a run: its cache goes with it."""
    shutil.rmtree(_CACHE, ignore_errors=True)


def golden_cases() -> dict[str, Path]:
    """Golden folders by name: those of tests/goldens, and larger ones where they exist."""
    cases: dict[str, Path] = {}
    for folder in (SHARED / "goldens", HERE / "goldens"):
        if folder.is_dir():
            cases |= {case.name: case for case in sorted(folder.iterdir()) if case.is_dir()}
    return cases


# Golden folders that are part of the project: a checkout without one of them is broken.
COMMITTED = frozenset(
    "comm_mfm convnext5 e2e_convllava e2e_llava15 e2e_mmfuser mlcd_llavanext_e2e "
    "mlcd_loss mlcd_vit_plain_clip mlcd_vit_rope2d mmfuser_block ms_deform_attn siglip_tower "
    "tensorrt_api unicom_partial_fc unireplknet5".split()
)


def golden_case(name: str) -> Path:
    """A golden folder. One that is not part of the project may be missing: then the test is
    skipped; a missing one of the project's own fails it.
    """
    found = golden_cases().get(name)
    if found is None:
        assert name not in COMMITTED, f"tests/goldens/{name} is missing"
        pytest.skip(f"golden case {name} is not here (it is not part of the project)")
    return found


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Path:
    """The golden folder named by the test's parameter."""
    return golden_case(request.param)


PORTABLE_OPSET = 24
# What ONNX Runtime raises where it knows no kernel, no op or no such opset; the last raises `Fail`,
# as much else does.
_LACKING = ("NotImplemented", "InvalidGraph")
_UNKNOWN_OPSET = "is under development"


def beyond_this_runtime(raised: BaseException) -> bool:
    """Whether an error says that this ONNX Runtime lacks an op or an opset, as those before 1.24
    do; Python 3.10 has none newer. Whatever else it raises is a failure.
    """
    if capabilities.of(this_cpu()).opset >= PORTABLE_OPSET:
        return False
    if isinstance(raised, UnsupportedError):
        return True
    kind = type(raised)
    return "onnxruntime" in kind.__module__ and (
        kind.__name__ in _LACKING or _UNKNOWN_OPSET in str(raised)
    )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """A test that meets a graph beyond this ONNX Runtime is skipped, with what it said."""
    try:
        return (yield)
    except Exception as raised:
        if not beyond_this_runtime(raised):
            raise
        pytest.skip(f"{this_cpu()} lacks what the test needs: {raised}")


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


@pytest.fixture
def bundle(ready: Path, tmp_path: Path) -> Path:
    """A copy of the bundle of `ready`, which may be damaged."""
    return Path(shutil.copytree(ready / "bundle", tmp_path / "bundle"))


@pytest.fixture
def engine(ready: Path, tmp_path: Path) -> Path:
    """The same of the engine."""
    return Path(shutil.copytree(ready / "engine-cpu", tmp_path / "engine"))


@pytest.fixture(scope="session")
def with_masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `mlcd-seg` (a random checkpoint of MLCD-Seg), `bundle` and `engine-cpu`."""
    from tests.pipeline import engine_of
    from tests.systems import segmenting

    folder = tmp_path_factory.mktemp("with-masks")
    segmenting.checkpoint(folder / "mlcd-seg", segmenting.sam())
    engine_of(folder / "mlcd-seg", folder)
    return folder
