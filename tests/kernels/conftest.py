"""Every test of this folder compiles for graphics cards, and needs none: make test-kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FETCHED = Path(sys.prefix, "tensorrt")  # where make puts what is not installed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.kernels)


@pytest.fixture(scope="session")
def triton() -> None:
    """Skips where Triton is missing."""
    pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")


@pytest.fixture(scope="session")
def cuda() -> Path:
    """The folder of a CUDA toolkit; skips where there is none."""
    for folder in (Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"))):
        if (folder / "include/cuda_runtime_api.h").exists():
            return folder
    pytest.skip("there is no CUDA toolkit in /usr/local")


def headers() -> dict[str, Path]:
    """Folders with TensorRT's headers, by release."""
    return {
        file.parents[1].name: file.parent for file in sorted(FETCHED.glob("v*/include/NvInfer.h"))
    }


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own, so that kernels are compiled and not found."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("triton")
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield folder
