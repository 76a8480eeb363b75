"""How the library of our own kernels is made, kept, checked, and done without."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from edgevlm.engines.native import library
from edgevlm.toolkit.errors import ConfigError

NOT_HERE = library.native().path is None


def compiler(folder: Path, script: str) -> str:
    """A program that stands for a compiler."""
    program = folder / "cc"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


def kept(folder: Path) -> Path:
    """A folder with what was made before; the library there."""
    made = library.native().path
    assert made is not None
    folder.mkdir(0o700, parents=True)
    for file in (made, made.with_suffix(".sha256")):
        shutil.copy(file, folder)
    return folder / made.name


@pytest.mark.skipif(NOT_HERE, reason="there are no kernels of ours here")
def test_it_is_kept_for_its_owner_and_made_once(tmp_path: Path) -> None:
    first = library.native().path
    assert first is not None
    assert first.parent.stat().st_mode & 0o777 == 0o700 and first.stat().st_mode & 0o777 == 0o600
    assert sorted(p.suffix for p in first.parent.iterdir()) == [".sha256", ".so"]
    made = kept(tmp_path / "native")
    before = made.stat().st_ino
    assert library._made(made.parent, "cc") == made and made.stat().st_ino == before
    # A part of a library would end the process that loads it.
    made.write_bytes(made.read_bytes()[:5000])
    assert library._made(made.parent, "cc") == made and made.stat().st_ino != before
    seal = made.with_suffix(".sha256").read_text()
    assert seal == hashlib.sha256(made.read_bytes()).hexdigest()
    assert library._loaded(made).form


@pytest.mark.skipif(NOT_HERE, reason="this processor has no use for the kernels")
@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            "echo 'attention.c:1: error: unknown target' >&2; exit 1",
            "cannot compile it: attention.c",
        ),
        ("exit 0", "nothing was made"),
    ],
)
def test_a_compiler_that_fails_is_told(tmp_path: Path, script: str, why: str) -> None:
    found = library._native(tmp_path / "native", compiler(tmp_path, script))
    assert found.path is None and why in found.why
    assert list((tmp_path / "native").iterdir()) == []


@pytest.mark.skipif(NOT_HERE, reason="this processor has no use for the kernels")
def test_without_a_compiler_there_are_none(tmp_path: Path) -> None:
    found = library._native(tmp_path, "no-such-compiler")
    assert found == library.Native(why="there is no C compiler (no-such-compiler)")


@pytest.mark.skipif(NOT_HERE, reason="this processor has no use for the kernels")
def test_what_others_may_write_is_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "native"
    kept(folder).chmod(0o666)
    assert "others" in library._native(folder, "cc").why
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert "others" in library._native(open_to_all, "cc").why
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert "others" in library._native(link, "cc").why


@pytest.mark.skipif(NOT_HERE or os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert library._native(tmp_path / "native", "cc").path is None


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    assert library.native() == library.Native(why="EDGEVLM_NATIVE=0")
    monkeypatch.setenv(library.SWITCH, "off")
    with pytest.raises(ConfigError, match="EDGEVLM_NATIVE=off"):
        library.native()


@pytest.mark.skipif(NOT_HERE, reason="there are no kernels of ours here")
def test_a_form_can_be_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.SWITCH, raising=False)
    best = library.native()
    here = library.forms_here(best)
    assert here[0] == "plain" and here[-1] == best.form
    for form in here:
        monkeypatch.setenv(library.SWITCH, form)
        assert library.native() == library.Native(best.path, form=form)
        assert library.described() == f"instructions of {form}, {best.path}"
    (absent, *_) = set(library.FORMS) - set(here)
    monkeypatch.setenv(library.SWITCH, absent)
    with pytest.raises(ConfigError, match=f"EDGEVLM_NATIVE={absent}") as refused:
        library.native()
    assert refused.value.hint is not None and best.form in refused.value.hint
    monkeypatch.delenv(library.SWITCH)
    assert library.native() == best


@pytest.mark.skipif(NOT_HERE, reason="there are no kernels of ours here")
def test_an_assembler_that_does_not_know_avx_vnni_makes_the_other_forms(tmp_path: Path) -> None:
    script = """case "$*" in *WITHOUT_AVX_VNNI*) exec cc "$@";; esac
echo "no such instruction" >&2; exit 1"""
    made = library._native(tmp_path / "native", compiler(tmp_path, script))
    assert made.path is not None and "avx-vnni" not in library.forms_here(made)
