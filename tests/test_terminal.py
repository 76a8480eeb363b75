"""On a terminal the running step has a spinner; its lines stay on the screen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgevlm import cli
from edgevlm.engines.evaluation.tasks import TASKS
from tests.conftest import HERE, ROOT

CHECKPOINT = HERE / "goldens/e2e_llava15/llava-v1.5-tiny"
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def on_terminal(*words: str) -> tuple[int, str]:
    """Exit code of a verb whose stderr is a terminal, and what it wrote there."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cli", *words]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 1 << 16):
            shown += piece
    except OSError:  # the other end was closed
        pass
    os.close(ours)
    return process.wait(), shown.decode()


def test_steps_stay_and_the_cursor_comes_back(tmp_path: Path) -> None:
    code, shown = on_terminal("export", str(CHECKPOINT), str(tmp_path / "b"))
    assert code == 0
    assert shown.rindex(SHOW) > shown.rindex(HIDE)
    kept = [line for line in re.split(r"\r|\n|\x1b\[2K", shown) if re.match(r" +\d", line)]
    assert [line.split("  ")[-1] for line in kept if "lm:" in line] == [
        "lm: writing graph and weights",
        "lm: running the reference for its goldens",
    ]


def test_an_error_stands_on_a_line_of_its_own(tmp_path: Path) -> None:
    on_terminal("export", str(CHECKPOINT), str(tmp_path / "b"))
    (tmp_path / "b/lm.onnx").write_bytes(b"changed")
    code, shown = on_terminal("build", str(tmp_path / "b"), str(tmp_path / "e"))
    assert code == 1
    assert shown.rindex(SHOW) > shown.rindex(HIDE)
    assert [s for s in shown.splitlines() if "error:" in s][-1].startswith("error: ")


@pytest.mark.parametrize(
    ("words", "typed", "found"),
    [
        (
            ["build", "b", "e", "--target"],
            "jetson-",
            "jetson-orin-nano jetson-agx-orin jetson-thor",
        ),
        (["plan", "x", "--target"], "h100,l", "h100,l4"),
        (["export", "x", "y", "--for"], "b2", "b200"),
        (["plan"], "preset:mmfuser", "preset:mmfuser-7b preset:mmfuser-0.5b"),
        (["eval", "engine"], "p", "perplexity pope probe"),
        ([], "cal", "calibrate"),
    ],
)
def test_the_shell_completes(words: list[str], typed: str, found: str) -> None:
    line = ["edgevlm", *words, typed]
    environment = {
        "_EDGEVLM_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(line),
        "COMP_CWORD": str(len(line) - 1),
    }
    done = CliRunner().invoke(cli.app, [], prog_name="edgevlm", env=environment)
    given = done.stdout.split()
    expected = [name for name in found.split() if name != "probe" or "probe" in TASKS]
    assert sorted(given) == sorted(expected)
