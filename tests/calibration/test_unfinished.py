"""An interrupted calibration goes on where it was, and gives the same; leftovers follow a rule."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edgevlm import api
from edgevlm.calibration import kept_codes, unfinished
from edgevlm.calibration.unfinished import Unfinished
from edgevlm.toolkit.errors import CalibrationError, OutputError
from tests.calibration.test_static import TEXT, draw
from tests.conftest import HERE
from tests.pipeline import engine_of, silent

STATIC: dict[str, Any] = {
    "to": "int8-static",
    "smooth": 0.5,
    "bias_correction": True,
    "text": TEXT,
    "window": 24,
    "windows": 2,
    "budget": 1e-9,
}
INT4: dict[str, Any] = {"text": TEXT, "window": 24, "windows": 6, "budget": 1e-9}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("float")
    engine_of(HERE / "goldens/e2e_llava15/llava-v1.5-tiny", work)
    return work / "bundle"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn") / "images", 7)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of torch wait for one another where ops are small and processors busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def wholes(
    bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, bytes], list[str]]]:
    """What calibrations that nobody interrupts write, and say."""
    found = {}
    for name, options in (("static", {**STATIC, "images": images}), ("int4", INT4)):
        lines: list[str] = []
        out = tmp_path_factory.mktemp(name) / "q"
        api.calibrate(bundle, out, progress=lines.append, **options)
        found[name] = (contents(out), lines)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stop_at(line: str, seen: list[str]) -> Callable[[str], None]:
    """Ctrl-C where `line` is begun."""

    def progress(message: str) -> None:
        seen.append(message)
        if line and line in message:
            raise KeyboardInterrupt

    return progress


STOPS = {  # where it is interrupted, and a line that is not to come again
    "channels": ("static", "channels: samples 5", "channels: samples 1 to"),
    "ranges": ("static", "ranges: samples 5", "ranges: samples 1 to"),
    "biases": ("static", "biases: samples 5", "ranges: samples"),
    "budget": ("static", "layers in float: samples 1", "errors: samples"),
    "written": ("static", "writing graph", "layers in float"),
    "linear": ("int4", "layers.1/attention/out", "layers.1/attention/v"),
    "mix": ("int4", "encoder.clip: writing", "measuring on"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_it_goes_on_and_gives_the_same(
    stop: str,
    bundle: Path,
    images: Path,
    wholes: dict[str, tuple[dict[str, bytes], list[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unfinished, "_SECONDS", 0.0)
    monkeypatch.setattr(kept_codes, "_IN_MEMORY", 0)
    name, line, before = STOPS[stop]
    options = {**STATIC, "images": images} if name == "static" else INT4
    expected, said = wholes[name]
    assert any(before in message for message in said)
    with pytest.raises(KeyboardInterrupt):
        api.calibrate(bundle, tmp_path / "q", progress=stop_at(line, []), **options)
    assert [path.name for path in tmp_path.glob(".*")] == [".q.calibrating"]
    again: list[str] = []
    api.calibrate(bundle, tmp_path / "q", progress=again.append, **options)
    assert again[0].startswith("going on")
    assert not any(before in message for message in again)
    assert contents(tmp_path / "q") == expected
    assert not list(tmp_path.glob(".*"))


def test_a_killed_one_goes_on_too(
    bundle: Path, wholes: dict[str, tuple[dict[str, bytes], list[str]]], tmp_path: Path
) -> None:
    program = f"""
import os
from edgevlm import api
from edgevlm.calibration import unfinished
unfinished._SECONDS = 0
def progress(line):
    if "layers.1/mlp/gate" in line:
        os.kill(os.getpid(), 9)
api.calibrate({str(bundle)!r}, {str(tmp_path / "q")!r}, text={str(TEXT)!r}, window=24, windows=6,
              budget=1e-9, progress=progress)
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == -9
    lines: list[str] = []
    api.calibrate(bundle, tmp_path / "q", progress=lines.append, **INT4)
    assert lines[0].startswith("going on")
    assert not any("layers.0" in line or "layers.1/attention" in line for line in lines)
    assert contents(tmp_path / "q") == wholes["int4"][0]


def test_what_another_command_left_is_thrown_away(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stop = stop_at("layers.1/mlp", [])
        api.calibrate(bundle, tmp_path / "q", progress=stop, **INT4)
    lines: list[str] = []
    api.calibrate(bundle, tmp_path / "q", progress=lines.append, **{**INT4, "block": 64})
    assert not any("going on" in line for line in lines)
    assert any("layers.0/attention/q" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_two_at_a_time_are_refused_and_refusals_leave_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Unfinished(tmp_path / "deep/.q.calibrating", api.made_by())
    running.begin(silent, "other")
    with pytest.raises(OutputError, match="belongs to a calibration that is running"):
        api.calibrate(bundle, tmp_path / "deep/q", **INT4)
    running.close(remove=True)
    (tmp_path / "deep").rmdir()

    def refuse(*given: Any) -> None:
        raise CalibrationError("no")

    monkeypatch.setattr("edgevlm.calibration.gptq.compensated", refuse)
    with pytest.raises(CalibrationError):
        api.calibrate(bundle, tmp_path / "deep/q", **INT4)
    assert not list(tmp_path.iterdir())
