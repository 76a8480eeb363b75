"""What runs engines, on the real cuda-core: its driver is driver.c, a card in the host's memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.engines.backends.tensorrt.conftest import GOLDEN
from tests.engines.backends.tensorrt.machine import OLDER

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed: make test-rtx")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler for the stand-in of the driver")
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", "-o", library, HERE / "driver.c", "-ldl"], check=True
    )
    return folder


@pytest.mark.parametrize("release", ["10.3.0", "11.4.0.106", "rtx-1.7.1.116"])
def test_a_session_on_the_real_cuda_core(release: str, driver: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(driver),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "tests.rtx.card_session", release, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = np.load(GOLDEN / "outputs.npz")["greedy_ids"].tolist()
    assert found["answers"] == [expected, expected]
    assert found["verified"]
    assert found["card"] == ["Stub", "13.5", False, "sm_89"]  # device.py, of the same driver
    memory, pinned, streams, graphs, launches = found["during"]
    assert memory > 3
    assert pinned > 3
    assert streams == 4  # one of each component, and the card's
    assert graphs == (2 if release in OLDER else 1)
    assert launches == 2 * 23 - graphs
    assert found["after"][:4] == [0, 0, 0, 0]  # all memory, streams and graphs are given back
