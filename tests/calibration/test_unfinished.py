"""An interrupted calibration goes on where it was, and gives the same; leftovers follow a rule."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm import api
from edgevlm.calibration import awq, gptq, kept_codes, unfinished
from edgevlm.calibration import calibrate as calibration
from edgevlm.calibration.kept_codes import KeptLayers
from edgevlm.calibration.many import Many
from edgevlm.calibration.quality import Quality
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
RTN = {**INT4, "method": "rtn"}  # no scales, and the float model does not run beside
NEVER = -1e12  # times the budget: no growth is that small, so every round is run
Wholes = dict[str, tuple[dict[str, bytes], list[str]]]


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


@pytest.fixture(scope="module", autouse=True)
def every_round() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_AIM", NEVER)
        yield


@pytest.fixture(scope="module")
def wholes(bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    """What calibrations that nobody interrupts write, and say."""
    found = {}
    static = {**STATIC, "images": images}
    for name, options in (("static", static), ("int4", INT4), ("rtn", RTN)):
        lines: list[str] = []
        out = tmp_path_factory.mktemp(name) / "q"
        api.calibrate(bundle, out, progress=lines.append, **options)
        found[name] = (contents(out), lines)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stop_at(line: str, seen: list[str], before: int = 0) -> Callable[[str], None]:
    """Ctrl-C where `line` is begun; before: how often it was begun before that."""

    def progress(message: str) -> None:
        seen.append(message)
        if line in message and sum(line in x for x in seen) > before:
            raise KeyboardInterrupt

    return progress


STOPS = {  # where it is interrupted, and a line that is not to come again
    "channels": ("channels: samples 5", "channels: samples 1 to"),
    "ranges": ("ranges: samples 5", "ranges: samples 1 to"),
    "biases": ("biases: samples 5", "ranges: samples"),
    "budget": ("layers in float: samples 1", "errors: samples"),
    "written": ("writing graph", "layers in float"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_it_goes_on_and_gives_the_same(
    stop: str,
    bundle: Path,
    images: Path,
    wholes: Wholes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unfinished, "_SECONDS", 0.0)
    line, before = STOPS[stop]
    options = {**STATIC, "images": images}
    expected, said = wholes["static"]
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


def found_in(lines: list[str]) -> list[str]:
    """Those that name what was found, each of which is found once."""
    return [line for line in lines if "error" in line or "input scaled" in line]


STOPS_IN_4_BITS = {  # the method, where it is interrupted, and in which round
    "a scale": ("int4", "layers.1/mlp/gate: input scaled", 0),
    "a linear": ("int4", "layers.1/attention/out", 0),
    "a measurement": ("int4", "perplexity", 0),
    "a later scale": ("int4", "layers.1/mlp/gate: input scaled", 1),
    "a later layer": ("int4", "layers.1/attention/q: input scaled", 1),
    "a later linear": ("int4", "layers.1/attention/out", 2),
    "a later measurement": ("int4", "perplexity", 2),
    "writing": ("int4", "encoder.clip: writing", 0),
    "a later linear without scales": ("rtn", "layers.1/attention/out", 2),
}


@pytest.mark.parametrize(("seconds", "in_memory"), [(0.0, 0), (float("inf"), 1 << 28)])
@pytest.mark.parametrize("stop", STOPS_IN_4_BITS)
def test_4_bits_go_on_and_give_the_same(
    stop: str,
    seconds: float,
    in_memory: int,
    bundle: Path,
    wholes: Wholes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unfinished, "_SECONDS", seconds)
    monkeypatch.setattr(kept_codes, "_IN_MEMORY", in_memory)
    method, line, before = STOPS_IN_4_BITS[stop]
    options = {"int4": INT4, "rtn": RTN}[method]
    seen, again = list[str](), list[str]()
    with pytest.raises(KeyboardInterrupt):
        api.calibrate(bundle, tmp_path / "q", progress=stop_at(line, seen, before), **options)
    api.calibrate(bundle, tmp_path / "q", progress=again.append, **options)
    assert again[0].startswith("going on")
    assert found_in(seen + again) == found_in(wholes[method][1])
    assert contents(tmp_path / "q") == wholes[method][0]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("what", ["awq.scales", "gptq.compensated", "calibrate.compare"])
def test_interrupted_while_something_is_found(
    what: str, bundle: Path, wholes: Wholes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any point of it: the first that was not found is found again, and nothing before."""
    module, name = what.split(".")
    where = {"awq": awq, "gptq": gptq, "calibrate": calibration}[module]
    run, calls = getattr(where, name), list[int]()

    def stops(*given: Any) -> Any:
        calls.append(len(calls))
        if len(calls) in {2, 4, 9, 21}:
            raise KeyboardInterrupt
        return run(*given)

    monkeypatch.setattr(where, name, stops)
    lines, interruptions = list[str](), 0
    while not (tmp_path / "q").exists():
        try:
            api.calibrate(bundle, tmp_path / "q", progress=lines.append, **INT4)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == {"awq": 4, "gptq": 4, "calibrate": 2}[module]
    assert found_in(lines) == found_in(wholes["int4"][1])
    assert contents(tmp_path / "q") == wholes["int4"][0]


def test_the_best_round_and_the_one_that_runs_take_room(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_codes, "_IN_MEMORY", 0)
    for number, (perplexities, line, before, rounds) in enumerate(
        (
            ((2.0, 3.0, 2.5), "layers.1/attention/out", 2, {0, 2}),
            ((4.0, 2.0, 3.0), "layers.1/attention/out", 2, {1, 2}),
            ((4.0, 2.0, 3.0), "encoder.clip: writing", 0, {1}),
        )
    ):
        made = []
        for name in ("whole", "interrupted"):
            out = tmp_path / f"{name} {number}"
            each = iter([Quality(10, 1.0, perplexity, 0.1, 0.5) for perplexity in perplexities])
            monkeypatch.setattr(calibration, "compare", lambda *given, each=each: next(each))
            if name == "interrupted":
                with pytest.raises(KeyboardInterrupt):
                    api.calibrate(bundle, out, progress=stop_at(line, [], before), **RTN)
                kept = out.with_name(f".{out.name}.calibrating").glob("round *")
                assert {int(file.name.split()[1]) for file in kept} == rounds
            found = api.calibrate(bundle, out, **RTN)
            assert isinstance(found, calibration.Calibration)
            made.append((contents(out), found.layers, found.share_4_bits))
        assert made[0] == made[1]


def test_hidden_states_are_kept_however_often_codes_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("edgevlm.calibration.unfinished.time.monotonic", lambda: now[0])
    kept = Unfinished(tmp_path / "kept", "test")
    kept.begin(silent, "test")
    layers = KeptLayers(kept)
    streams = [Many([np.full((1, 2, 4), x, np.float32)]) for x in (1, 2)]
    for now[0] in (4.0, 8.0):
        kept.put("codes", {"codes": np.zeros(1, np.uint8)})
        layers.leaves(streams)
    again, zeros = KeptLayers(kept), [Many([np.zeros((1, 2, 4), np.float32)])] * 2
    assert again.passed(zeros) == zeros
    passed = again.passed(zeros)
    assert passed is not None
    assert [float(x[0].mean()) for x in passed] == [1, 2]
    assert again.passed(zeros) is None


def test_a_killed_one_goes_on_too(bundle: Path, wholes: Wholes, tmp_path: Path) -> None:
    program = f"""
import os
from edgevlm import api
from edgevlm.calibration import calibrate, unfinished
calibrate._AIM = {NEVER}
unfinished._SECONDS = 0
seen = []
def progress(line):
    seen.append(line)
    if "layers.1/mlp/gate (" in line and sum("layers.1/mlp/gate (" in x for x in seen) == 2:
        os.kill(os.getpid(), 9)
api.calibrate({str(bundle)!r}, {str(tmp_path / "q")!r}, text={str(TEXT)!r}, window=24, windows=6,
              budget=1e-9, progress=progress)
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == -9
    lines: list[str] = []
    api.calibrate(bundle, tmp_path / "q", progress=lines.append, **INT4)
    assert lines[0].startswith("going on")
    first = next(line for line in lines if "error" in line)
    assert "layers.1/mlp/up" in first
    assert sum("layers.0/attention/q (" in line for line in lines) == 1  # of the third round
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
