"""The commands of the demo: shown as they are typed, run as they are shown, and remembered.

OUT/demo.json says which commands of the demo have ended there, so that the next call keeps what
they made.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgevlm.toolkit.bundle.publish import entries
from edgevlm.toolkit.errors import ConfigError, OutputError, ToolkitError
from edgevlm.toolkit.strict import from_plain, read_json
from edgevlm.toolkit.terminal import failures, program
from edgevlm.toolkit.terminal.console import Console

RECORD = "demo.json"
_KIND = "demo"
_GRACE_S = 1.0  # a Ctrl-C reached the command too; SIGTERM reached this process alone
_ENDING_S = 10.0
_WIDTH = 92
_OPTION = re.compile(r" (?=--?[a-z])")


@dataclass(frozen=True)
class Step:
    """A command of the demo. seconds: that it took when it ran; null while it runs.

    kept: it ran in an earlier call, and what it made is taken as it is.
    """

    command: str
    seconds: float | None
    kept: bool = False


@dataclass
class Commands:
    """Runs commands of edgevlm in the current folder. earlier: those of earlier calls, by name."""

    out: Path
    console: Console
    made_by: str
    earlier: Mapping[str, Step]
    steps: dict[str, Step] = field(default_factory=dict)
    current: bool = True  # every step before was kept

    def make(self, name: str, *words: object, result: Path, resumable: bool = False) -> None:
        """A command that writes `result`, unless it ended in an earlier call of the same version
        that had the same steps until here. resumable: one that was cut short goes on.
        """
        before, command = self.earlier.get(name), shown(*words)
        same = self.current and before is not None and before.command == command
        if same and before is not None and before.seconds is not None and result.exists():
            self._note(name, Step(command, before.seconds, kept=True))
            self.say(f"$ {folded(command)}")
            self.say(f"kept: an earlier call made it, in {before.seconds:.1f} s")
            return
        self.current = False
        if resumable and result.exists():
            words = self._again(result, words, same=same)
        self._note(name, Step(command, None))
        seconds = self._run(words, None)
        self._note(name, Step(command, seconds))

    def run(self, name: str, *words: object, into: Path | None = None) -> None:
        """A command that writes nothing that later ones need; into: takes what it prints."""
        command = shown(*words) + (f" > {shlex.quote(str(into))}" if into else "")
        self._note(name, Step(command, self._run(words, into)))

    def say(self, text: str = "") -> None:
        """A line for people."""
        if not self.console.quiet:
            print(text, flush=True)

    def _again(self, folder: Path, words: tuple[object, ...], *, same: bool) -> tuple[object, ...]:
        """The command that goes on with a run that was cut short; another run is thrown away."""
        if same and (folder / "training.json").exists():
            return (*words, "--resume")
        shutil.rmtree(folder)
        return words

    def _note(self, name: str, step: Step) -> None:
        self.steps[name] = step
        known = {**(self.earlier if self.current else {}), **self.steps}
        plain = {key: asdict(value) for key, value in known.items()}
        text = json.dumps({"kind": _KIND, "made_by": self.made_by, "steps": plain}, indent=1)
        partial = self.out / f".{RECORD}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.out / RECORD)

    def _run(self, words: Sequence[object], into: Path | None) -> float:
        """The seconds that a command took. Raises ToolkitError if it fails."""
        redirected = f" > {shlex.quote(str(into))}" if into else ""
        self.say(f"$ {folded(shown(*words) + redirected)}")
        began = time.perf_counter()
        code, told = _started([*_program(), *map(str, words)], into, self.console.quiet)
        seconds = time.perf_counter() - began
        if code:
            raise self._failed(words, code, told)
        self.say(f"took {seconds:.1f} s")
        return seconds

    def _failed(self, words: Sequence[object], code: int, told: str) -> ToolkitError:
        """told: its errors, where they were not shown."""
        message = f"`{shown(*words)}` failed with exit code {code}"
        again = shown("demo", self.out)
        return ToolkitError(
            f"{message}: {told}" if told else message,
            hint=f"mend that; then `{again}` goes on where it stopped",
        )


def opened(out: Path, console: Console, made_by: str, *, force: bool) -> Commands:
    """Commands that write into `out`, which is made. force: nothing of earlier calls is kept.

    Raises OutputError where `out` holds something else than a demo.
    """
    record = out / RECORD
    earlier: dict[str, Step] = {}
    if record.exists():
        earlier = _read(record, made_by)
    elif os.path.lexists(out) and (not out.is_dir() or entries(out)):
        raise OutputError(
            f"{out} exists and holds no demo; it is left alone",
            hint=f"{shown('demo', 'ANOTHER_FOLDER')}",
        )
    out.mkdir(parents=True, exist_ok=True)
    return Commands(out, console, made_by, {} if force else earlier)


def _read(record: Path, made_by: str) -> dict[str, Step]:
    """The steps of earlier calls; none of those of another version. Raises OutputError."""
    refused = OutputError(
        f"{record} was not written by the demo, and its folder is left alone",
        hint=f"{shown('demo', 'ANOTHER_FOLDER')}",
    )
    try:
        data = read_json(record)
        if data.get("kind") != _KIND:
            raise refused
        kind: Any = dict[str, Step]
        steps: dict[str, Step] = from_plain(kind, data.get("steps"), str(record))
    except ConfigError:
        raise refused from None
    return steps if data.get("made_by") == made_by else {}


def shown(*words: object) -> str:
    """A command of edgevlm as it is typed in this shell."""
    return shlex.join([*_typed(), *map(str, words)])


def folded(command: str) -> str:
    """A command in lines of at most 92 letters, broken in front of options as shells allow it."""
    lines, line = [], ""
    for part in _OPTION.split(command):
        if line and len(line) + len(part) > _WIDTH - 4:
            lines.append(line)
            line = "   "
        line += f" {part}" if line else part
    return " \\\n".join([*lines, line])


def _script() -> Path | None:
    """The program `edgevlm` that runs this, or the one of this Python; None if there is neither."""
    for path in (Path(sys.argv[0]), Path(sys.executable).with_name(program.NAME)):
        if path.name == program.NAME and path.is_file():
            return path
    return None


def _program() -> list[str]:
    script = _script()
    return [sys.executable, "-m", "edgevlm.cli"] if script is None else [str(script)]


def _typed() -> list[str]:
    """The same program by its shortest name here."""
    script = _script()
    if script is not None:
        return [program.shortest(script)]
    return [program.shortest(Path(sys.executable)), "-m", "edgevlm.cli"]


def _started(words: Sequence[str], into: Path | None, quiet: bool) -> tuple[int, str]:
    """The exit code of a program, and with `quiet` its errors, which are shown otherwise."""
    pipe = subprocess.PIPE if quiet else None
    file = into.open("wb") if into else None
    try:
        hidden = subprocess.DEVNULL if quiet else None
        process = subprocess.Popen(words, stdout=file or hidden, stderr=pipe, text=True)
        try:
            _, told = process.communicate()
        except BaseException:
            _end(process, quiet=quiet)
            raise
    finally:
        if file:
            file.close()
    lines = [line for line in (told or "").splitlines() if line.startswith(("error: ", "hint: "))]
    return process.returncode, " ".join(lines)


def _end(process: subprocess.Popen[str], *, quiet: bool) -> None:
    """Let an interrupted program end as it ends by itself, and say so once."""
    for wait, stop in ((_GRACE_S, process.terminate), (_ENDING_S, process.kill)):
        try:
            process.wait(wait)
            break
        except subprocess.TimeoutExpired:
            stop()
    process.wait()
    if process.returncode == 130 and not quiet:
        failures.leave(130)  # it has said what happened
