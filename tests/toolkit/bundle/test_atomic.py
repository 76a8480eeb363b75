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


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale, living = (tmp_path / f".out.partial-{pid}" for pid in (dead.pid, os.getppid()))
    for folder in (stale, living):
        folder.mkdir()
    made(tmp_path / "out", "1")
    assert names(tmp_path) == {"out", living.name}


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
