"""The work folder of `benchmarks.compare`: an environment for each program, and the models.

WORK/NAME/venv is a program's environment, WORK/model holds the checkpoint and what the programs
made of it. Both are kept: what exists is not made again, unless what it is made of has changed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path

from benchmarks.common import ROOT

Make = Callable[[Path], None]


class Unavailable(Exception):
    """A program that cannot be installed, prepared or measured here, and why."""


@dataclass(frozen=True)
class Setting:
    """One row of the table: a program's module, its model, what it is told.

    files: what it reads, for its size on disk; the model alone if empty.
    """

    name: str
    module: str
    model: Path
    words: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def model_mb(self) -> float:
        """Of what it reads."""
        return sum(size(path) for path in self.files or (self.model,)) / 1e6


@dataclass(frozen=True)
class Place:
    """The work folder."""

    work: Path

    @property
    def models(self) -> Path:
        """Where all models are."""
        return self.work / "model"

    def python(self, program: str) -> Path:
        """The interpreter of a program; ours is the one that runs this."""
        if program == "edgevlm":
            return Path(sys.executable)
        return self.work / program / "venv" / "bin" / "python"

    def tool(self, program: str, name: str) -> Path:
        """A command of a program's environment."""
        return self.python(program).parent / name

    def run(
        self,
        command: Sequence[str | Path],
        more: Mapping[str, str] | None = None,
        limit_s: float = 3600,
    ) -> str:
        """A command's output; Unavailable with its last words if it fails. more: environment."""
        added = dict(more or {})
        path = os.pathsep.join(filter(None, [added.get("PYTHONPATH"), self._path(command)]))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= added | {"PYTHONPATH": path}
        words = [str(word) for word in command]
        try:
            done = subprocess.run(
                words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{Path(words[0]).name}: {error}") from None
        if done.returncode != 0:
            last = _last(done.stderr or done.stdout).replace(str(self.work), "WORK")
            raise Unavailable(f"`{_short(words)}` failed: {last.replace(str(ROOT), '.')}")
        return done.stdout

    def _path(self, command: Sequence[str | Path]) -> str:
        ours = os.environ.get("PYTHONPATH", "") if str(command[0]) == sys.executable else ""
        return os.pathsep.join(filter(None, [str(ROOT), ours]))

    def install(self, program: str, *steps: Sequence[str], without: Sequence[str] = ()) -> None:
        """An environment with `steps` of packages installed one after another.

        without: packages that they bring along, of a build that does not fit.
        """
        stamp = self.work / program / "installed.json"
        wanted = [*(list(step) for step in steps), *(["without", name] for name in without)]
        if stamp.exists() and json.loads(stamp.read_text()) == wanted:
            return
        told(f"installing {program}")
        stamp.parent.mkdir(parents=True, exist_ok=True)
        if not self.python(program).exists():
            self.run([sys.executable, "-m", "venv", stamp.parent / "venv"])
        for step in steps:
            self.run([self.python(program), "-m", "pip", "install", "--quiet", *step])
        for name in without:
            self.run([self.python(program), "-m", "pip", "uninstall", "--quiet", "-y", name])
        stamp.write_text(json.dumps(wanted))

    def once(self, out: Path, make: Make, key: str = "") -> Path:
        """`out`, made by `make` at another name unless it exists, made with the same `key`."""
        stamp = out.with_name(out.name + ".key")
        if out.exists() and (stamp.read_text() if stamp.exists() else "") == key:
            return out
        begin = time.perf_counter()
        partial = out.with_name("partial-" + out.name)
        for stale in (partial, out, stamp):
            folder = stale.is_dir() and not stale.is_symlink()
            shutil.rmtree(stale) if folder else stale.unlink(missing_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        make(partial)
        partial.rename(out)
        if key:
            stamp.write_text(key)
        told(f"made {out.name} in {time.perf_counter() - begin:.0f} s")
        return out

    def installed_mb(self, program: str, packages: Sequence[str]) -> float:
        """Size of packages with what they need, without extras."""
        folders = [str(p) for p in self.python(program).parent.parent.glob("lib/*/site-packages")]
        if program == "edgevlm":
            folders = [path for path in sys.path if path.endswith("site-packages")]
        found = {_normal(d.metadata["Name"]): d for d in distributions(path=folders)}
        left, counted = [_normal(name) for name in packages], dict[str, int]()
        while left:
            name = left.pop()
            if name in found and name not in counted:
                counted[name] = _files_of(found[name])
                needs = [n for n in found[name].requires or () if "extra ==" not in n]
                left += [_normal(re.split(r"[^A-Za-z0-9._-]", n, maxsplit=1)[0]) for n in needs]
        return sum(counted.values()) / 1e6


def told(message: str) -> None:
    """What goes on, for people who wait."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def size(path: Path) -> int:
    """Bytes of a file or of all files in a folder."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


def _files_of(distribution: Distribution) -> int:
    paths = [Path(str(distribution.locate_file(f))) for f in distribution.files or ()]
    return sum(p.stat().st_size for p in paths if p.is_file())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _short(words: Sequence[str]) -> str:
    """The command without the folders of this machine."""
    return " ".join(Path(word).name if "/" in word else word for word in words)[:120]


def _last(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line] or lines or ["no message"]
    return errors[-1][:300]
