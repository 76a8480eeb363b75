"""Kernels in Triton's interpreter against the reference: any machine, a few seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

# Of the largest value: what fp16 and bf16 round results to; the merge rounds normed levels too.
MOST = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-2}


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: make test-kernels installs it",
)


def test_every_kernel_equals_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout)
    assert len(found) == 18
    wrong = {n: error for n, error in found.items() if not error < MOST[n.rpartition(", ")[2]]}
    assert wrong == {}


def test_the_benchmark_runs_to_its_end() -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--interpret", "--images", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["device"] == "the interpreter"
    assert len(result["rows"]) == 3
    for row in result["rows"]:
        assert row["right"]
        assert set(row["ms"]) == {"kernel", "eager", "compiled", "unfused"}
