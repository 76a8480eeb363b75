"""Paths and small helpers that the tests share."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from edgevlm.engines.lowering import capabilities
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


# Golden folders that are part of the project: a checkout without one of them is broken.
COMMITTED = frozenset(
    "comm_mfm convnext5 e2e_convllava e2e_llava15 e2e_mmfuser mlcd_llavanext_e2e "
    "mlcd_vit_plain_clip mlcd_vit_rope2d mmfuser_block ms_deform_attn siglip_tower "
    "unireplknet5".split()
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
