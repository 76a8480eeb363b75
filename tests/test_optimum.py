"""edgevlm below optimum's command line: the small distribution that brings it, and its commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import HERE, ROOT

SOURCE = ROOT / "integrations/optimum"
REGISTERED = "optimum/commands/register/register_edgevlm.py"
CHECKPOINT = HERE / "goldens/e2e_llava15/llava-v1.5-tiny"
with_optimum = pytest.mark.skipif(
    not find_spec("optimum"), reason="optimum is not installed (pip install 'optimum>=2')"
)


@pytest.fixture(scope="module")
def small_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy."""
    copy, out = tmp_path_factory.mktemp("optimum") / "source", tmp_path_factory.mktemp("wheel")
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_it_adds_one_file_to_optimums_namespace(small_wheel: Path) -> None:
    with zipfile.ZipFile(small_wheel) as files:
        packed = [name for name in files.namelist() if ".dist-info/" not in name]
    assert packed == [REGISTERED]


def test_our_own_wheel_has_no_folder_of_optimums(wheel: Path) -> None:
    """A program that finds one takes optimum for installed."""
    with zipfile.ZipFile(wheel) as files:
        assert not any(name.startswith("optimum") for name in files.namelist())


@pytest.fixture(scope="module")
def installed(small_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the distribution, beside optimum's own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-deps", "--no-index", "--target", str(folder), str(small_wheel)]
    done = subprocess.run([*command, *offline], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def optimum_cli(installed: Path, *words: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@with_optimum
def test_optimums_command_line_exports_and_runs_our_verbs(installed: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    done = optimum_cli(installed, "export", "edgevlm", "-m", CHECKPOINT, bundle, "--dtype", "fp16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (bundle / "manifest.json").exists()
    done = optimum_cli(installed, "edgevlm", "inspect", bundle, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"kind": "bundle"' in done.stdout
    done = optimum_cli(installed, "edgevlm", "inspect", tmp_path / "nothing")
    assert done.returncode == 1
    assert "error:" in done.stderr
