"""Artifacts are whole or absent, and nothing of anybody else's is touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgevlm.toolkit.bundle.atomic import refuse_existing, require_space, sha256_of, writing
from edgevlm.toolkit.errors import OutputError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def made(out: Path, text: str, *, force: bool = False) -> None:
    with writing(out, force=force) as folder:
        described = {"made_by": text, "files": {"weights": {}}}
        (folder / "manifest.json").write_text(json.dumps(described))


def maker(out: Path) -> str:
    """The text that `made` was given."""
    found: str = json.loads((out / "manifest.json").read_text())["made_by"]
    return found


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep/er/out"
    with writing(out, force=False) as folder:
        (folder / "manifest.json").write_text("1")
        assert not out.exists()
    assert (out / "manifest.json").read_text() == "1"
    assert names(out.parent) == {"out"}


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_block_that_fails(tmp_path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind), writing(tmp_path / "out", force=False) as folder:
        (folder / "half").write_text("1")
        raise kind
    assert names(tmp_path) == set()


def test_an_artifact_is_replaced_by_force_only_and_kept_on_failure(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(out, "1")
    with pytest.raises(OutputError, match="exists") as refused:
        made(out, "2")
    assert "--force" in refused.value.hint
    with pytest.raises(ValueError, match="no"), writing(out, force=True):
        raise ValueError("no")
    assert maker(out) == "1"
    made(out, "3", force=True)
    assert maker(out) == "3"
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, force: bool) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/photo.jpg").touch()
    (tmp_path / "file").write_text("x")
    for name in ("theirs", "file"):
        with pytest.raises(OutputError, match="not an artifact of ours"):
            made(tmp_path / name, "1", force=force)
    assert names(tmp_path / "theirs") == {"photo.jpg"}
    assert (tmp_path / "file").read_text() == "x"


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refuse_existing(tmp_path / "out", force=False)
    made(tmp_path / "out", "1")
    assert names(tmp_path / "out") == {"manifest.json"}


# A process that begins to write and then waits to be killed; argv: OUT, and "old" to stop between
# the two renames with which an artifact is replaced.
WRITER = """
import sys, time
from pathlib import Path
from edgevlm.toolkit.bundle.atomic import writing
def wait(*told):
    print(*told, flush=True)
    time.sleep(60)
rename = Path.rename
def stopping(self, target):
    if "old" in sys.argv and ".partial-" in self.name:
        wait(self)
    return rename(self, target)
Path.rename = stopping
with writing(Path(sys.argv[1]), force="old" in sys.argv) as folder:
    (folder / "manifest.json").write_text('{"made_by": "new", "files": {}}')
    if "old" not in sys.argv:
        wait(folder)
"""


def writer(out: Path, *words: str) -> tuple[subprocess.Popen[str], Path]:
    """A process in the middle of writing `out`, and its partial folder."""
    command = [sys.executable, "-c", WRITER, str(out), *words]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    return running, Path(running.stdout.readline().strip())


def kill(running: subprocess.Popen[str]) -> None:
    running.kill()
    running.communicate()


def test_a_living_writer_is_left_alone_and_a_dead_ones_leftovers_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    running, partial = writer(out)
    try:
        assert partial.name in names(tmp_path)
        made(out, "1")
        assert names(tmp_path) == {"out", partial.name, f"{partial.name}.lock"}
    finally:
        kill(running)
    assert (partial / "manifest.json").exists()
    made(out, "2", force=True)
    assert names(tmp_path) == {"out"}
    assert maker(out) == "2"


def test_a_writer_is_known_by_its_lock_and_not_by_a_process_of_its_name(tmp_path: Path) -> None:
    """In another container neither its number nor that of a leftover says anything."""
    absent = 1 << 22  # more than a process's number can be
    held, free = (tmp_path / f".out.partial-{number}" for number in (absent, os.getpid()))
    for folder in (held, free):
        folder.mkdir()
        folder.with_name(f"{folder.name}.lock").touch()
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, f"{held}.lock"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        made(tmp_path / "out", "1")
        assert names(tmp_path) == {"out", held.name, f"{held.name}.lock"}
    finally:
        kill(holder)


def test_a_writer_killed_between_its_renames_gives_the_old_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(out, "old")
    running, partial = writer(out, "old")
    kill(running)
    assert names(tmp_path) == {partial.name, f"{partial.name}-old", f"{partial.name}.lock"}
    with pytest.raises(OutputError, match="exists"):
        made(out, "again")
    assert maker(out) == "old"
    assert names(tmp_path) == {"out"}


def test_without_locks_a_leftover_is_told_by_its_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    young, old = (tmp_path / f".out.partial-{name}" for name in ("young", "old"))
    for folder in (young, old):
        folder.mkdir()
        folder.with_name(f"{folder.name}.lock").touch()
    for path in (old, old.with_name(f"{old.name}.lock")):
        os.utime(path, (0, 0))
    made(tmp_path / "out", "1")
    assert names(tmp_path) == {"out", young.name, f"{young.name}.lock"}


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "could not be written")],
)
def test_what_the_disk_says_is_told(tmp_path: Path, number: int, reason: str) -> None:
    with pytest.raises(OutputError, match=reason), writing(tmp_path / "out", force=False):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == set()


def test_space_is_asked_for_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = type("Usage", (), {"free": 5_000_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    require_space(tmp_path / "not/there/yet", 5_000_000)
    with pytest.raises(OutputError, match=r"0\.01 GB"):
        require_space(tmp_path / "not/there/yet", 6_000_000)


def test_a_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = os.urandom(5_000_000)
    (tmp_path / "a").write_bytes(data)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()
