"""The wheel: every file of the packages below one import name, and nothing else; and the pins."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LOOSE, PACKAGES, ROOT


@pytest.fixture
def files(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """The wheel, opened."""
    with zipfile.ZipFile(wheel) as opened:
        yield opened


def text_of(files: zipfile.ZipFile, ending: str) -> str:
    return files.read(next(n for n in files.namelist() if n.endswith(ending))).decode()


def package_files() -> set[str]:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    found = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    return {f"edgevlm/{name}" for name in found | set(LOOSE)}


def test_it_holds_every_file_of_the_packages_and_nothing_else(files: zipfile.ZipFile) -> None:
    packed = {name for name in files.namelist() if ".dist-info/" not in name}
    assert packed == package_files()


def test_pyproject_lists_every_folder_with_code() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(
        r"^packages = \[\n(.*?)^\]", text[text.index("[tool.setuptools]") :], re.M | re.S
    )
    assert listed is not None
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    expected = {".".join(("edgevlm", *path.relative_to(ROOT).parts)) for path in folders}
    assert sorted(re.findall(r'"(.+)"', listed[1])) == sorted(expected | {"edgevlm"})


def test_it_is_small_and_carries_its_licence(wheel: Path, files: zipfile.ZipFile) -> None:
    assert wheel.stat().st_size < 1_200_000
    kinds = {".py", ".c", ".h", ".cu", ".cpp", ".html", ".typed", ".txt", ""}  # and no data
    own = [info for info in files.infolist() if ".dist-info/" not in info.filename]
    assert {Path(info.filename).suffix for info in own} <= kinds
    assert max(info.file_size for info in own) < 25_000
    assert "Apache License" in text_of(files, "licenses/LICENSE")
    assert "edgevlm = edgevlm.cli:main" in text_of(files, "entry_points.txt")


def test_the_base_install_is_light(files: zipfile.ZipFile) -> None:
    required = re.findall(r"^Requires-Dist: ([\w-]+)([^\n]*)", text_of(files, "METADATA"), re.M)
    base = {name for name, rest in required if "extra ==" not in rest}
    assert base == {"numpy", "tokenizers", "pillow", "safetensors", "typer", "rich", "jinja2"}


def test_whatever_make_installs_is_pinned(files: zipfile.ZipFile) -> None:
    required = re.findall(r"^Requires-Dist: ([\w-]+)([^\n]*)", text_of(files, "METADATA"), re.M)
    extras = re.compile(r"extra == .(cpu|export|train|demo|dev).")
    needed = {name for name, rest in required if "extra ==" not in rest or extras.search(rest)}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    assert needed - {"edgevlm"} - pinned == set()
