"""Writers that are killed: at every step of theirs, and at random moments.

python -m tests.fuzz.kills [N [SEED]] [verbs]: every step, then N kills at random (100), or as many
of the verbs `export` and `build`. Nothing may be lost or left, and where the system can exchange
two names nothing may be missing for a moment.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from edgevlm.calibration.unfinished import Unfinished
from edgevlm.toolkit.bundle import atomic, publish, sealed, unfinished
from edgevlm.toolkit.bundle.atomic import sha256_of, writing
from edgevlm.toolkit.errors import ToolkitError
from edgevlm.toolkit.strict import read_json

MODES = ("exchanged", "renamed", "moved")  # how a folder is replaced; moved: as on a mounted disk
_CALLS: tuple[tuple[Any, str], ...] = (
    *((Path, name) for name in ("rename", "replace", "unlink", "mkdir", "rmdir", "write_text")),
    *((os, name) for name in ("open", "write", "unlink", "rmdir", "pwrite", "replace")),
    (publish, "exchanged"),
)
_NEIGHBOURS = (".out.partial-notes", f".out.partial-{'0' * 16}", ".out.calibrating-notes")
_FILES = ("weights", "graph")


class Broken(AssertionError):
    """A kill did harm."""


# -- what is written -----------------------------------------------------------------------------


def write(out: Path, text: str) -> None:
    """An artifact whose files all hold `text`."""
    with writing(out, force=True) as folder:
        for name in _FILES:
            (folder / name).write_text(f"{text} {name}\n" * 1000)
        files = {name: {"sha256": sha256_of(folder / name)} for name in _FILES}
        sealed.write(folder / "manifest.json", {"made_by": text, "files": files})


def text_of(out: Path) -> str:
    """The text of an artifact. Raises Broken if it is not whole, ConfigError if it is not there."""
    data = sealed.opened(read_json(out / "manifest.json"), str(out))
    for name, record in data["files"].items():
        if sha256_of(out / name) != record["sha256"]:
            raise Broken(f"{name} is not that of the manifest")
    others = {name for name in os.listdir(out) if not unfinished.is_entry(name)}
    if others != {*_FILES, "manifest.json"}:
        raise Broken(f"{sorted(others)}")
    return str(data["made_by"])


@contextmanager
def replacing(mode: str) -> Iterator[None]:
    """The way in which folders are replaced meanwhile."""
    with ExitStack() as stack:
        if mode == "moved":
            for module in (atomic, publish):
                kept = mock.patch.object(module, "must_be_kept", lambda path: path.name == "out")
                stack.enter_context(kept)
        elif mode == "renamed":
            stack.enter_context(mock.patch.object(publish, "exchanged", lambda *names: False))
        yield


# -- killing -------------------------------------------------------------------------------------


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run `work` in a process that is killed before its call number `step`; whether it was.

    Each call counts twice: it can be killed before it and after it.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise Broken(f"the writer failed at step {step}")
        return os.WIFSIGNALED(status)
    code = 1
    try:
        left = iter(range(step))
        for place, name in _CALLS:
            setattr(place, name, _dying(getattr(place, name), left))
        work()
        code = 0
    finally:
        os._exit(code)


def _dying(call: Callable[..., Any], left: Iterator[int]) -> Callable[..., Any]:
    def dying(*given: Any, **options: Any) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*given, **options)
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return dying


def every_step(mode: str, home: Path) -> int:
    """Replace an artifact and be killed at each step; how many there were. Raises Broken."""
    steps = 0
    while True:
        work = home / f"{mode}-{steps}"
        out = _begun(work)
        with replacing(mode):
            if not killed_at(steps, lambda out=out: write(out, "new")):  # type: ignore[misc]
                return steps
            _check(out, mode, {"old", "new"}, f"{mode}, step {steps}")
        shutil.rmtree(work)
        steps += 1


def _begun(work: Path) -> Path:
    """An artifact, beside folders of somebody else."""
    for name in _NEIGHBOURS:
        (work / name).mkdir(parents=True)
        (work / name / "thesis.txt").write_text("years of work")
    write(work / "out", "old")
    return work / "out"


def _check(out: Path, mode: str, texts: set[str], where: str) -> None:
    """One of the texts is there, at once or after recovering, and the next writer works."""
    if mode == "exchanged" and text_of(out) not in texts:
        raise Broken(f"{where}: {text_of(out)}")
    unfinished.recover(out)
    if text_of(out) not in texts:
        raise Broken(f"{where}: {text_of(out)} after recovering")
    write(out, "next")
    names = sorted(path.name for path in out.parent.iterdir())
    if text_of(out) != "next" or names != sorted(["out", *_NEIGHBOURS]):
        raise Broken(f"{where}: left are {names}")
    if not all((out.parent / name / "thesis.txt").exists() for name in _NEIGHBOURS):
        raise Broken(f"{where}: somebody else's files are gone")


def at_random(mode: str, home: Path, generator: random.Random) -> str:
    """Replace an artifact again and again until a kill; what was found then. Raises Broken."""
    out = _begun(home / "random")
    child = os.fork()
    if not child:
        with replacing(mode):
            for number in range(100_000):
                write(out, f"{number}")
        os._exit(1)
    time.sleep(generator.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with replacing(mode):
        if mode == "exchanged" or (out / "manifest.json").exists():
            found = text_of(out)
        else:
            found = "missing"
        unfinished.recover(out)
        _check(out, mode, {text_of(out)}, f"{mode}, at random")
    shutil.rmtree(out.parent)
    return "old" if found == "old" else "missing, put back" if found == "missing" else "new"


def of_calibration(home: Path) -> int:
    """Keep sums and be killed at each step; what is taken up then is whole. Raises Broken."""
    steps = 0
    while True:
        folder = home / f"sums-{steps}"
        dead = killed_at(steps, lambda folder=folder: _keep(folder, 2))  # type: ignore[misc]
        kept = Unfinished(folder, "kills")
        kept.begin(lambda message: None, "settings")
        if kept.has("sums") and kept.get("sums")["x"].tolist() not in ([1.0] * 9, [2.0] * 9):
            raise Broken(f"calibration, step {steps}")
        kept.close(remove=True)
        if folder.exists():
            raise Broken(f"calibration, step {steps}: {os.listdir(folder)} are left")
        if not dead:
            return steps
        steps += 1


def _keep(folder: Path, times: int) -> None:
    kept = Unfinished(folder, "kills")
    kept.begin(lambda message: None, "settings")
    for number in range(times):
        kept.put("sums", {"x": np.full(9, number + 1.0)})
    kept.close(remove=False)


# -- the command line ----------------------------------------------------------------------------


def of_verbs(count: int, home: Path, generator: random.Random) -> Counter[str]:
    """`export --force` and `build --force` over what is there, killed at random moments, and the
    next try without a kill. What became of them. Raises Broken.
    """
    from edgevlm.engines import manifest
    from edgevlm.toolkit.bundle.manifest import Bundle
    from tests.pipeline import engine_of
    from tests.refusals import GOLDEN, LM

    engine_of(GOLDEN / LM, home)
    bundle, engine = home / "bundle", home / "engine-cpu"
    words = {
        "export": ("export", GOLDEN / LM, bundle, "--dtype", "bf16", "--force", "-q"),
        "build": ("build", bundle, engine, "--max-context", 64, "--force", "-q"),
    }
    seconds = {verb: _ran(words[verb], None) for verb in ("build", "export")}
    found: Counter[str] = Counter()
    for number in range(count):
        verb = ("export", "build")[number % 2]
        _ran(words[verb], generator.uniform(0, seconds[verb]))
        Bundle.open(bundle).verify()
        manifest.check_files(engine, manifest.read(engine), verify=True)
        left = [path for path in home.iterdir() if path not in (bundle, engine)]
        found[f"{verb}: killed, {'something' if left else 'nothing'} left to clear"] += 1
    for verb in words:
        _ran(words[verb], None)
    left = [path for path in home.iterdir() if path not in (bundle, engine)]
    if left:
        raise Broken(f"left are {left}")
    return found


def _ran(words: tuple[object, ...], until: float | None) -> float:
    """Run the command line in a process, and kill it after so many seconds; how long it ran."""
    from edgevlm import cli

    begun, child = time.perf_counter(), os.fork()
    if not child:
        nothing = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(nothing, number)
        sys.argv = ["edgevlm", *map(str, words)]
        try:
            cli.main()
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        os._exit(9)
    if until is not None:
        time.sleep(until)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if until is None and status:
        raise Broken(f"{words[0]} ended with {status}")
    return time.perf_counter() - begun


def main(words: list[str]) -> int:
    """Every step, then N kills at random."""
    verbs = "verbs" in words
    words = [word for word in words if word != "verbs"]
    count, seed = int(words[0] if words else 100), int(words[1] if words[1:] else 0)
    generator, outcomes = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="edgevlm-kills-") as folder:
        home = Path(folder)
        try:
            if verbs:
                outcomes += of_verbs(count, home, generator)
                count = 0
            for mode in MODES:
                outcomes[f"{mode}: steps"] = every_step(mode, home)
            outcomes["calibration: steps"] = of_calibration(home)
            for number in range(count):
                mode = MODES[number % len(MODES)]
                outcomes[f"{mode}: at random, {at_random(mode, home, generator)}"] += 1
        except (Broken, ToolkitError) as harm:
            print(f"HARM: {type(harm).__name__}: {harm}")
            return 1
    for name, number in sorted(outcomes.items()):
        print(f"{number:7} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
