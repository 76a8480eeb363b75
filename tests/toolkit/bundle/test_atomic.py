"""Artifacts are whole or absent, and nothing of anybody else's is touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edgevlm.toolkit.bundle import atomic, publish, sealed, unfinished
from edgevlm.toolkit.bundle.atomic import refuse_existing, require_space, sha256_of, writing
from edgevlm.toolkit.bundle.unfinished import Unfinished
from edgevlm.toolkit.errors import OutputError
from tests.conftest import ROOT


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def made(out: Path, text: str, *, force: bool = False) -> None:
    with writing(out, force=force) as folder:
        sealed.write(folder / "manifest.json", {"made_by": text, "files": {"weights": {}}})


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
# the two renames with which an artifact is replaced where names cannot be exchanged.
WRITER = """
import sys, time
from pathlib import Path
from edgevlm.toolkit.bundle import publish, sealed
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
publish.exchanged = lambda one, other: False
with writing(Path(sys.argv[1]), force="old" in sys.argv) as folder:
    sealed.write(folder / "manifest.json", {"made_by": "new", "files": {}})
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


def leftover(out: Path, digits: str, *, lock: str = "") -> Path:
    """An unfinished folder of `out` as a killed writer leaves it."""
    folder = out.with_name(f".{out.name}.partial-{digits}")
    folder.mkdir()
    folder.with_name(f"{folder.name}.lock").write_text(lock or unfinished._MARK)
    return folder


HELD, FREE = "0" * 16, "f" * 16


def test_a_writer_is_known_by_its_lock(tmp_path: Path) -> None:
    """In another container neither its number nor that of a leftover says anything."""
    held, _ = (leftover(tmp_path / "out", digits) for digits in (HELD, FREE))
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


def test_what_only_looks_like_a_leftover_is_left_alone(tmp_path: Path) -> None:
    """Folders of others, whatever they are called: only a file of ours beside one makes it ours."""
    for name in ("notes", "4194305", HELD, FREE):
        folder = tmp_path / f".out.partial-{name}"
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
    (tmp_path / f".out.partial-{FREE}.lock").write_text("somebody else's")
    (tmp_path / f".out.partial-{HELD}-old").mkdir()
    before = names(tmp_path)
    made(tmp_path / "out", "1")
    made(tmp_path / "out", "2", force=True)
    assert names(tmp_path) == before | {"out"}
    assert all((tmp_path / f".out.partial-{n}/thesis.txt").exists() for n in ("notes", HELD, FREE))


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


@pytest.mark.skipif(platform.system() != "Linux", reason="names are exchanged on Linux alone")
def test_an_artifact_is_replaced_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no moment without it: neither name is moved away."""
    out = tmp_path / "out"
    made(out, "1")
    (tmp_path / "link").symlink_to(out)
    monkeypatch.setattr(Path, "rename", None)
    made(tmp_path / "link", "2", force=True)
    assert maker(out) == "2"
    assert names(tmp_path) == {"out", "link"}
    with pytest.raises(FileNotFoundError):
        publish.exchanged(out, tmp_path / "nothing")


# -- folders that cannot be replaced: mounted disks --------------------------------------------


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is taken for a mounted disk, with what its file system puts there."""
    folder = tmp_path / "disk"
    (folder / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(publish, "must_be_kept", lambda path: path == folder)
    monkeypatch.setattr(atomic, "must_be_kept", lambda path: path == folder)
    return folder


def test_an_empty_disk_is_filled_and_its_artifact_replaced(disk: Path) -> None:
    number = disk.stat().st_ino
    made(disk, "1")
    with pytest.raises(OutputError, match="exists"):
        made(disk, "2")
    made(disk, "3", force=True)
    assert (maker(disk), disk.stat().st_ino) == ("3", number)
    assert names(disk) == {"manifest.json", "lost+found"}
    (disk / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"left alone: thesis\.txt"):
        made(disk, "4", force=True)


class Killed(BaseException):
    """What a process does not survive: no block of it cleans up after this."""


@pytest.mark.parametrize("moves", range(7))
def test_moves_that_were_interrupted_are_undone_or_finished(
    moves: int, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files go out and three come in; the last one says that it is done."""
    made(disk, "old")
    (disk / "weights").write_text("old weights")
    rename, left = Path.rename, iter(range(moves))

    def dying(self: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dying)
    monkeypatch.setattr(Unfinished, "clear", lambda self: None)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    with suppress(Killed), writing(disk, force=True) as folder:
        for name in ("weights", "more"):
            (folder / name).write_text("new weights")
        sealed.write(folder / "manifest.json", {"made_by": "new", "files": {"weights": 0}})
    monkeypatch.undo()
    unfinished.recover(disk)
    assert maker(disk) == ("new" if moves > 4 else "old")
    assert (disk / "weights").read_text() == f"{maker(disk)} weights"
    assert (disk / "more").exists() == (moves > 4)
    assert not [name for name in names(disk) if "partial" in name]


def test_a_real_mounted_disk_is_filled(tmp_path: Path) -> None:
    """Bound from a folder of the same disk, which only the system's table tells."""
    for name in ("source", "out"):
        (tmp_path / name).mkdir()
    code = (
        "import sys; from tests.toolkit.bundle.test_atomic import *\n"
        "for text in '12': made(Path('out'), text, force=True)"
    )
    script = f"mount --bind source out && {shlex.join([sys.executable, '-c', code])}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    try:
        done = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert maker(tmp_path / "source") == "2"
    assert names(tmp_path / "source") == {"manifest.json"}
    assert names(tmp_path) == {"source", "out"}


def test_without_locks_a_leftover_is_told_by_its_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    young, old = (leftover(tmp_path / "out", digits) for digits in (HELD, FREE))
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
