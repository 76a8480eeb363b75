"""Every test of this folder runs NVIDIA's builder; none needs a graphics card."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.engines.backends.tensorrt.flavours import RTX

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="TensorRT-RTX is not installed: make test-rtx")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.rtx)
            if not RTX.installed():
                item.add_marker(missing)
