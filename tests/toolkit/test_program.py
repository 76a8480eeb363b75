"""Commands that are printed can be copied, in an environment that is not activated too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgevlm.toolkit.terminal import program

TEXT = "edgevlm build a b, edgevlm's own edgevlm, /x/edgevlm run, 'edgevlm[cpu]'; edgevlm --help"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """edgevlm in a folder that is not on the path, started from where it stands."""
    folder = tmp_path / "an environment/bin"
    folder.mkdir(parents=True)
    path = folder / "edgevlm"
    path.touch()
    path.chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.chdir(tmp_path)
    return path


def test_a_command_has_the_path_that_the_shell_needs(script: Path) -> None:
    near = "'an environment/bin/edgevlm'"
    assert program.as_typed(TEXT) == (
        f"{near} build a b, edgevlm's own edgevlm, /x/edgevlm run, 'edgevlm[cpu]'; {near} --help"
    )


def test_on_the_path_the_name_is_enough(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"/usr/bin:{script.parent}")
    assert program.as_typed(TEXT) == TEXT


def test_from_elsewhere_the_whole_path_is_told(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert program.typed() == str(script.relative_to("/"))
    monkeypatch.chdir("/usr")
    assert program.typed() == str(script)
    monkeypatch.chdir(script.parent)
    assert program.typed() == "./edgevlm"


@pytest.mark.parametrize("started", ["cli.py", "edgevlm", "-m"])
def test_started_in_another_way_it_is_called_edgevlm(
    started: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [started])
    assert program.as_typed(TEXT) == TEXT


def test_every_verb_is_known() -> None:
    from typer.main import get_command

    from edgevlm import cli

    verbs = get_command(cli.app).commands  # type: ignore[attr-defined]
    assert sorted(verbs) == sorted(program._VERBS.split())
