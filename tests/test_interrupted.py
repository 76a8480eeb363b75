"""Ctrl-C, kill, a full disk, closed pipes: no half artifact, one line, and the next try works."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.toolkit.bundle import publish
from tests.conftest import ROOT
from tests.refusals import GOLDEN, IMAGE, LM, edgevlm, refuses, tree

# The command line in a process of its own. It waits at a progress line until it is released, so
# that a signal always arrives there; it may be limited to small files.
START = """
import json, resource, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" leaves it ignored
stop, limit = json.loads(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.path.insert(0, "")
sys.argv[0] = "edgevlm"
from edgevlm import cli
from edgevlm.toolkit.terminal.console import Console
step = Console.step
def slow(self, message):
    step(self, message)
    if stop and stop in message:
        time.sleep(600)
Console.step = slow
cli.main()
"""


def start(*words: object, stop: str = "", limit: int = 0, **streams: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", START, json.dumps([stop, limit])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen([*command, *map(str, words)], cwd=ROOT, text=True, **pipes)


def verbs(ready: Path, out: Path) -> dict[str, tuple[object, ...]]:
    return {"export": ("export", GOLDEN / LM, out), "build": ("build", ready / "bundle", out)}


MOMENTS = [
    ("export", "encoder.clip: writing", signal.SIGINT),
    ("export", "lm: running the reference", signal.SIGTERM),
    ("build", "checking the bundle's files", signal.SIGTERM),
    ("build", "lm: comparing", signal.SIGINT),
]


@pytest.mark.parametrize(("verb", "moment", "number"), MOMENTS)
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupt_leaves_what_was_there(
    verb: str, moment: str, number: signal.Signals, force: bool, ready: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = verbs(ready, out)[verb]
    if force:
        shutil.copytree(ready / ("bundle" if verb == "export" else "engine-cpu"), out)
        words = (*words, "--force")
    before = tree(tmp_path)
    running = start(*words, stop=moment)
    assert running.stderr is not None
    lines = []
    for line in running.stderr:
        lines.append(line)
        if moment in line:
            break
    running.send_signal(number)
    printed, rest = running.communicate(timeout=60)
    assert (running.returncode, printed) == (130, ""), "".join(lines) + rest
    assert rest == "error: interrupted; nothing half-written was left behind\n"
    assert tree(tmp_path) == before
    if not force:
        assert edgevlm(*words).code == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_between_the_two_renames_keeps_the_old(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(ready / "bundle", tmp_path / "out"))
    before = tree(out)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and not self.name.endswith("-old"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    monkeypatch.setattr(publish, "exchanged", lambda one, other: False)
    ran = edgevlm("export", GOLDEN / LM, out, "--force", "--quiet")
    assert (ran.code, ran.err.splitlines()[-1][:18]) == (130, "error: interrupted")
    assert tree(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- a full disk -------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1000, 20_000, 150_000, 400_000])
@pytest.mark.parametrize("verb", ["export", "build"])
def test_a_file_that_cannot_grow_leaves_nothing(
    verb: str, limit: int, ready: Path, tmp_path: Path
) -> None:
    words = verbs(ready, tmp_path / "new" / "out")[verb]
    if verb == "build":  # weights are linked: only graphs are written
        limit = min(limit, 20_000)
    running = start(*words, "--quiet", limit=limit)
    printed, err = running.communicate(timeout=60)
    assert (running.returncode, printed) == (1, ""), err
    error, hint = err.splitlines()
    assert error.startswith(f"error: {tmp_path / 'new' / 'out'} could not be written: the disk is")
    assert hint == "hint: free some space, or write to another disk; nothing was left behind"
    assert list(tmp_path.iterdir()) == []


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


MOMENTS_OF_WRITING: list[tuple[Any, str]] = [
    (Path, "mkdir"), (Path, "write_bytes"), (Path, "write_text"), (np, "savez_compressed"),
    (Path, "rename"),
]  # fmt: skip


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("where", "name"), MOMENTS_OF_WRITING)
def test_a_disk_that_fills_up_at_any_step_leaves_nothing(
    where: Any, name: str, force: bool, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["export", GOLDEN / LM, tmp_path / "out", "--quiet"]
    if force:
        shutil.copytree(ready / "bundle", tmp_path / "out")
        words.append("--force")
    monkeypatch.setattr(where, name, full)
    if name == "rename":
        monkeypatch.setattr(publish, "exchanged", full)
    error, hint = refuses(tmp_path, *words)
    assert f"{tmp_path / 'out'} could not be written: the disk is full" in error
    assert "free some space" in hint


def test_too_little_space_is_seen_before_the_work(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    for words in verbs(ready, tmp_path / "out").values():
        error, hint = refuses(tmp_path, *words, "--quiet")
        assert f"{tmp_path / 'out'} needs" in error
        assert "0.00 GB free" in error
        assert "another disk" in hint


# -- streams -----------------------------------------------------------------------------------


STREAMS: list[Callable[[Path], tuple[object, ...]]] = [
    lambda ready: ("inspect", ready / "bundle"),
    lambda ready: ("inspect", ready / "bundle", "--json"),
    lambda ready: ("run", ready / "engine-cpu", "What?", "--max-tokens", 200, "--quiet"),
    lambda ready: ("--help",),
]


@pytest.mark.parametrize("number", range(len(STREAMS)))
def test_a_reader_that_leaves_early_causes_no_message(number: int, ready: Path) -> None:
    gone, theirs = os.pipe()
    os.close(gone)  # before anything can be written
    with os.fdopen(theirs, "w") as stream:
        running = start(*STREAMS[number](ready), stdout=stream)
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (1, "")


def test_a_terminal_without_unicode_gets_the_answer(ready: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    words = ("run", ready / "engine-cpu", "What?", "--image", IMAGE, "--max-tokens", 40)
    running = start(*words, env=environment)
    printed, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    assert printed.isascii()
    assert "\\x" in printed or "\\u" in printed  # the tiny model's answer has such letters


@pytest.mark.parametrize("number", [1, 2])
def test_a_stream_that_the_shell_closed_is_no_failure(number: int, ready: Path) -> None:
    words = (
        sys.executable,
        ROOT / "cli.py",
        "run",
        ready / "engine-cpu",
        "What?",
        "--max-tokens",
        4,
    )
    line = f"{shlex.join(map(str, words))} {number}>&-"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) == (number == 2)  # the answer arrives where only errors are unheard
