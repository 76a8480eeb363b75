"""The wheel: every file of the packages below one import name, and nothing else; and the pins."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("toolkit", "export", "engines", "training", "calibration")
LOOSE = ("__init__.py", "api.py", "cli.py", "py.typed")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", *LOOSE, *PACKAGES)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built offline from a copy, so that nothing lands in the checkout or is left from before."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            junk = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(ROOT / name, copy / name, ignore=junk)
        else:
            shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(out.glob("edgevlm-*.whl")))


def text_of(wheel: zipfile.ZipFile, ending: str) -> str:
    return wheel.read(next(n for n in wheel.namelist() if n.endswith(ending))).decode()


def package_files() -> set[str]:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    found = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    return {f"edgevlm/{name}" for name in found | set(LOOSE)}


def test_it_holds_every_file_of_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == package_files()


def test_it_is_small_and_carries_its_licence(wheel: zipfile.ZipFile) -> None:
    assert Path(str(wheel.filename)).stat().st_size < 1_000_000
    assert "Apache License" in text_of(wheel, "licenses/LICENSE")
    assert "edgevlm = edgevlm.cli:main" in text_of(wheel, "entry_points.txt")


def test_the_base_install_is_light(wheel: zipfile.ZipFile) -> None:
    required = re.findall(r"^Requires-Dist: ([\w-]+)([^\n]*)", text_of(wheel, "METADATA"), re.M)
    base = {name for name, rest in required if "extra ==" not in rest}
    assert base == {"numpy", "tokenizers", "pillow", "safetensors", "typer", "rich"}


def test_whatever_make_installs_is_pinned(wheel: zipfile.ZipFile) -> None:
    required = re.findall(r"^Requires-Dist: ([\w-]+)([^\n]*)", text_of(wheel, "METADATA"), re.M)
    extras = re.compile(r"extra == .(cpu|export|train|dev).")
    needed = {name for name, rest in required if "extra ==" not in rest or extras.search(rest)}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    assert needed - {"edgevlm"} - pinned == set()
