"""The demo runs to its end and gives the original code's answer."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.skipif(find_spec("skimage") is None, reason="the demo's photograph is scikit-image's")
def test_the_demo_runs_and_its_tokens_are_the_originals(tmp_path: Path) -> None:
    command = [sys.executable, "examples/demo.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 of 24 tokens are equal." in done.stdout
    assert "of 24 tokens are still the original's" in done.stdout
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"bundle", "engine", "engine-int8", "chelsea.png", "profile.html"}
