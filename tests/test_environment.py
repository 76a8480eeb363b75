"""Hostile surroundings: interrupts at start-up, closed and full streams, odd encodings."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgevlm.toolkit import target
from edgevlm.toolkit.errors import (
    MissingExtra,
    ToolkitError,
    interrupted,
    needing,
    printable,
    shortened,
)
from edgevlm.toolkit.strict import to_json
from edgevlm.toolkit.target import threads_here
from edgevlm.toolkit.terminal import console, failures, streams
from tests.conftest import ROOT
from tests.refusals import edgevlm, refuses
from tests.test_interrupted import start

# A signal arrives while a package is imported; then the package may make an ImportError of it, as
# compiled ones do, or swallow it.
ARRIVING = """
import os, signal, sys
sys.path.insert(0, "")
package, number, way = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" leaves it ignored
class Watch:
    def find_spec(self, name, *rest):
        if name != package:
            return
        sys.meta_path.remove(self)
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt as came:
            if way == "as it is":
                raise
            if way == "failed":
                raise ImportError("initialization failed") from came
            if way == "missing":
                raise ModuleNotFoundError(name, name=name) from None
sys.meta_path.insert(0, Watch())
sys.argv[0] = "edgevlm"
from edgevlm import cli
cli.main()
"""
INTERRUPTED = "error: interrupted; nothing half-written was left behind\n"


def arriving(package: str, number: int, way: str, *words: object) -> tuple[int, str, str]:
    command = [sys.executable, "-c", ARRIVING, package, str(int(number)), way]
    done = subprocess.run(
        [*command, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("number", "way"),
    [(signal.SIGINT, "as it is"), (signal.SIGTERM, "failed"), (signal.SIGTERM, "missing")],
)
def test_an_interrupted_import_is_not_a_missing_package(number: int, way: str, ready: Path) -> None:
    words = ("run", ready / "engine-cpu", "What?", "--max-tokens", 1, "--quiet")
    assert arriving("onnxruntime", number, way, *words) == (130, "", INTERRUPTED)


def test_an_interrupt_before_the_first_line_of_ours_is_told() -> None:
    assert arriving("typer", signal.SIGINT, "as it is", "--help") == (130, "", INTERRUPTED)


def imported(error: ImportError, cause: BaseException | None = None) -> None:
    with needing("onnxruntime", "cpu", purpose="running"):
        raise error from cause


def test_a_package_that_is_there_and_broken_is_not_called_missing() -> None:
    with pytest.raises(MissingExtra, match="is installed and cannot be loaded: no GLIBC") as broken:
        imported(ImportError("no GLIBC"))
    assert broken.value.hint == "pip install --force-reinstall 'edgevlm[cpu]'"
    with pytest.raises(MissingExtra, match="is not installed"):
        imported(ModuleNotFoundError("No module named 'onnxruntime'"))
    with pytest.raises(KeyboardInterrupt):
        imported(ImportError("initialization failed"), KeyboardInterrupt())
    assert not interrupted(ValueError())


def test_an_interrupt_that_a_callback_loses_prints_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGALRM
    before = [signal.getsignal(number) for number in numbers]
    hook = sys.unraisablehook
    try:
        interrupts = failures.Interrupts()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.came

        class Odd:
            def __del__(self) -> None:
                raise KeyboardInterrupt

        Odd()
        with pytest.raises(KeyboardInterrupt):  # it comes again
            time.sleep(60)
        assert capsys.readouterr().err == ""
        assert failures.told(ValueError("x"), debug=False, came=lambda: interrupts.came) == 130
        assert capsys.readouterr().err == INTERRUPTED
        interrupts.end()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        sys.unraisablehook = hook
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# -- streams -----------------------------------------------------------------------------------


def test_a_full_disk_under_the_output_is_told(ready: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with (
        open("/dev/full", "w") as full,
        start("inspect", ready / "bundle", "--json", stdout=full) as running,
    ):
        _, err = running.communicate(timeout=60)
    assert running.returncode == 1
    assert err == "error: standard output: No space left on device\n"


def test_what_nobody_reads_on_stderr_stops_no_work(ready: Path, tmp_path: Path) -> None:
    with start("build", ready / "bundle", tmp_path / "engine") as running:
        assert running.stderr is not None
        running.stderr.close()
        assert running.stdout is not None
        assert "engine: built for" in running.stdout.read()
        assert running.wait(60) == 0
    with open(os.devnull) as unwritable:
        stream = streams._Unheard(unwritable)
        assert stream.write("lost") == 4
        stream.flush()
        assert not stream.isatty()


ENCODINGS = [
    {"PYTHONIOENCODING": "ascii:strict"}, {"PYTHONIOENCODING": "utf-16"},
    {"PYTHONIOENCODING": "cp037"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ENCODINGS)))
def test_json_is_ascii_in_every_encoding(number: int, ready: Path, tmp_path: Path) -> None:
    (tmp_path / "größe 大").symlink_to(ready / "engine-cpu")
    command = [
        sys.executable,
        str(ROOT / "cli.py"),
        "inspect",
        str(tmp_path / "größe 大"),
        "--json",
    ]
    environment = os.environ | ENCODINGS[number]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert done.stdout.endswith(b"}\n")
    assert done.stdout.count(b"\n") == 1
    assert json.loads(done.stdout)["kind"] == "engine"


def test_json_holds_no_nan() -> None:
    data = {"a": [1.5, math.nan, -math.inf], "b": "\ud800é", 3: (None, True)}
    assert to_json(data) == '{"a": [1.5, null, null], "b": "\\ud800\\u00e9", "3": [null, true]}'


# -- what is shown -----------------------------------------------------------------------------


def test_quoted_values_are_cut_and_controls_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    error = ToolkitError(f"key = {'x' * 5000!r}, expected one; the model's {'y' * 900!r} too")
    assert error.message.startswith(f"key = '{'x' * 200}…', expected one; the model's 'yy")
    assert len(error.message) <= 603
    assert shortened("it's " * 60) == "it's " * 60  # apostrophes quote nothing
    assert len(shortened("a" * 10**6)) <= 603
    failures.fail("a \x1b[2J\x1b]0;title\x07 b\nc \u202e\ud800", "d\x00", 1)
    told = capsys.readouterr().err
    assert told == "error: a \\x1b[2J\\x1b]0;title\\x07 b c \\u202e\\ud800\nhint: d\\x00\n"
    assert printable("größe 大 🙂 \u200d", keep="") == "größe 大 🙂 \u200d"


def test_a_terminal_gets_no_control_characters_of_a_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown() -> str:
        out = console.Console()
        out.stream("a\x1b[31m\n\tb")
        out.result({}, ["name \x1b[31m", *console.table(("[red]x",), [("[/] \x1b[0m",)])])
        return capsys.readouterr().out

    assert "a\x1b[31m\n\tb" in shown()  # a file or a program gets the answer as it is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    told = shown()
    assert "a\\x1b[31m\n\tb" in told
    assert "name \\x1b[31m" in told
    assert "[/] \\x1b[0m" in told


# -- threads -----------------------------------------------------------------------------------


def test_threads_have_a_bound_and_a_warning(ready: Path, tmp_path: Path) -> None:
    cores = threads_here()
    words = ("run", ready / "engine-cpu", "What?", "--max-tokens", 1, "--threads")
    for threads in (4 * cores + 1, 5000, 10**12):
        error, hint = refuses(tmp_path, *words, threads, "--quiet")
        assert f"--threads {threads} is far beyond the {cores} processor(s)" in error
        assert f"at most {4 * cores} are accepted" in hint
    ran = edgevlm(*words, cores + 1)
    assert ran.code == 0
    assert f"note: --threads {cores + 1} is more than the {cores} processor(s)" in ran.err
    assert target.note_on_threads(cores) == ""
    assert edgevlm(*words, 5000).err.startswith("error: ")  # and no note before it


def test_a_defect_of_a_foreign_panic_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A panic of Rust is no Exception: it would pass every `except Exception`."""

    class PanicException(BaseException):
        pass

    told: dict[str, Any] = {"debug": False, "came": lambda: False}
    assert failures.told(PanicException("index out of bounds"), **told) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: PanicException: index out of bounds"
    assert "defect" in hint
    with pytest.raises(SystemExit):
        failures.told(SystemExit(3), **told)
