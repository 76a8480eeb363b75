"""A batch on Ray Data, with two real processes: equal to one process, whatever is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from edgevlm.engines.runtime.question import Question
from edgevlm.engines.serving import batch_job
from edgevlm.engines.serving.batch_parts import Settings
from edgevlm.toolkit.terminal.console import Console
from tests.conftest import ROOT

pytestmark = [pytest.mark.scale, pytest.mark.slow]
PARTS, TOKENS = 60, 48


@pytest.fixture(autouse=True)
def _needs_ray() -> None:
    pytest.importorskip("ray", reason="needs Ray: make test-scale installs it")
    if (psutil.cpu_count() or 1) < 2:
        pytest.skip("two processes with a thread each need two processors")


@pytest.fixture
def requests(photos: list[Path], tmp_path: Path) -> Path:
    """Questions about pictures, one of which is none, in 60 parts of two."""
    (photos[0].parent / "none.png").write_bytes(b"none")
    names = [photo.name for photo in photos] + ["none.png"]
    lines = [
        {"prompt": f"Tell me of {number}", "image": f"photos/{names[number % 8]}"}
        for number in range(2 * PARTS)
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture
def expected(engine: Path, requests: Path, tmp_path: Path) -> dict[str, bytes]:
    """What one process writes."""
    given, settings = Question("", max_tokens=TOKENS), Settings(part=2, slots=2)
    out, console = tmp_path / "alone", Console(quiet=True)
    how: Any = {"threads": 1, "cluster": None, "console": console}
    batch_job.answer(engine, requests, out, given, settings, **how)
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((out / "parts").iterdir())}


@contextmanager
def started(engine: Path, requests: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """The verb with two actors of one thread."""
    words = [str(engine), str(requests), str(out), "--part", "2", "--slots", "2", "--json"]
    words += ["--max-tokens", str(TOKENS), "--ray", "local", "--actors", "2", "--threads", "1"]
    command = [sys.executable, "-m", "edgevlm.cli", "batch", *words]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        yield process


def wait_for(out: Path, parts: int) -> None:
    end = time.monotonic() + 120
    while len(list(out.glob("done/*.json"))) < parts:
        assert time.monotonic() < end, "no parts are finished"
        time.sleep(0.005)


def actors(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of Ray that compute parts."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "MapBatches(Actor)" in " ".join(child.cmdline())]


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(output)
    return found


def test_a_process_that_is_killed_is_replaced(
    engine: Path, requests: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "job"
    with started(engine, requests, out) as process:
        wait_for(out, 4)
        working = actors(process)
        assert len(working) == 2
        working[0].kill()
        found = told(process)
    assert contents(out) == expected
    assert (found["processes"], found["failed"], found["resumed_parts"]) == (2, 15, 0)


def test_a_job_that_is_killed_goes_on(
    engine: Path, requests: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "job"
    with started(engine, requests, out) as process:
        wait_for(out, 4)
        working = actors(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(working, timeout=60)  # they end with the one who began them
    assert alive == []
    resumed = len(list(out.glob("done/*.json")))
    assert 4 <= resumed < PARTS
    with started(engine, requests, out) as process:
        found = told(process)
    assert contents(out) == expected
    assert found["resumed_parts"] == resumed


def test_an_engine_that_cannot_be_opened_is_told_in_words(
    engine: Path, requests: Path, tmp_path: Path
) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(engine, damaged)
    weights = next(damaged.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    with started(damaged, requests, tmp_path / "job") as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "is damaged" in errors and "hint: build it again" in errors
    assert "Traceback" not in errors
