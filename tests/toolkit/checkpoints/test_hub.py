"""Sources by name: a folder wins, a model id comes from the cache, anything else is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from edgevlm.toolkit.checkpoints.hub import locate
from edgevlm.toolkit.errors import CheckpointError

NAME = "some-org/some-model.v1"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub's own shape with one model in two revisions."""
    folder = tmp_path / "hub"
    model = folder / "models--some-org--some-model.v1"
    for revision, commit in (("main", "a" * 40), ("old", "b" * 40)):
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text(revision)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / revision).write_text(commit)
    import huggingface_hub

    whole: Any = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: whole(*a, cache_dir=folder, **k)
    )
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(("revision", "text"), [(None, "main"), ("old", "old"), ("b" * 40, "old")])
def test_a_model_of_the_cache(cache: Path, revision: str | None, text: str) -> None:
    found = locate(NAME, revision=revision, offline=True)
    assert (found / "config.json").read_text() == text
    assert cache in found.parents


def test_a_folder_wins(cache: Path) -> None:
    (cache.parent / NAME).mkdir(parents=True)
    assert locate(NAME, revision=None, offline=True) == Path(NAME)
    assert locate(str(cache), revision=None, offline=True) == cache


@pytest.mark.parametrize(("name", "revision"), [("some-org/other", None), (NAME, "newer")])
def test_what_is_not_in_the_cache(cache: Path, name: str, revision: str | None) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is not in the local cache") as refused:
        locate(name, revision=revision, offline=True)
    assert "--offline" in refused.value.hint


@pytest.mark.parametrize(
    "name", ["missing", "./some-org/model", "/some-org/model", "a/b/c", "../model", "a b/c", "~/x"]
)
def test_what_is_neither_folder_nor_model(cache: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist, and it is not a model id"):
        locate(name, revision=None, offline=True)


def test_a_file_is_no_folder_and_no_model(cache: Path) -> None:
    (cache.parent / "dir").mkdir()
    (cache.parent / "dir/config.json").write_text("{}")
    for name in ("dir/config.json", os.path.abspath("dir/config.json")):
        with pytest.raises(CheckpointError, match="is not a folder"):
            locate(name, revision=None, offline=True)


@pytest.mark.parametrize("reason", ["", "first\nsecond"])
def test_the_reason_of_the_package_is_given(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **given: Any) -> None:
        assert given["local_files_only"] is False
        raise RuntimeError(reason)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(CheckpointError, match="could not be fetched") as refused:
        locate(NAME, revision=None, offline=False)
    assert "second" not in refused.value.message
