"""The installed wheel inside a project whose own modules are called like our folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HERE

FOLDERS = ("toolkit", "export", "engines", "training", "calibration")
MODULES = ("cli", "api")
CASE = HERE / "goldens/e2e_llava15"
SCRIPT = """
import sys
import edgevlm, cli, api, toolkit, export, engines, training, calibration
own = [cli, api, toolkit, export, engines, training, calibration]
assert [m.OWNER for m in own] == ["the project"] * 7
edgevlm.export_bundle(sys.argv[1], "bundle")
edgevlm.build_engine("bundle", "engine", target="reference")
session = edgevlm.Session.open("engine")
answer = session.answer(edgevlm.Question("What is in the image?", [sys.argv[2]], max_tokens=3))
session.close()
assert len(answer.token_ids) == 3
loaded = {n: m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "edgevlm"}
print("FROM", sorted({f.split("/edgevlm/")[0] for f in loaded.values()}))
"""


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the wheel, without a network."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-deps", "--no-index", "--no-compile", "--target", str(folder), str(wheel)]
    done = subprocess.run([*command, *offline], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that has a module or package of every name that our folders have."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text('OWNER = "the project"\n')
    for name in MODULES:
        (tmp_path / f"{name}.py").write_text('OWNER = "the project"\n')
    return tmp_path


def python(installed: Path, project: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run Python inside the project; PYTHONPATH is searched before any editable install."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(installed)
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_project_and_edgevlm_keep_their_own_modules(installed: Path, project: Path) -> None:
    done = python(installed, project, "-c", SCRIPT, CASE / "llava-v1.5-tiny", CASE / "image.png")
    assert done.returncode == 0, done.stderr
    assert f"FROM ['{installed}']" in done.stdout


def test_the_command_line_runs_inside_the_project(installed: Path, project: Path) -> None:
    done = python(installed, project, "-m", "edgevlm.cli", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.1.0\n", "")
    doctor = python(installed, project, "-m", "edgevlm.cli", "doctor", "--quiet")
    assert doctor.returncode == 0, doctor.stderr


def test_a_module_of_the_project_would_be_noticed(installed: Path, project: Path) -> None:
    """The check itself: an import without the package's name gets the project's module."""
    done = python(installed, project, "-c", "from toolkit.errors import ToolkitError")
    assert "No module named 'toolkit.errors'" in done.stderr


def test_import_edgevlm_alone_loads_nothing_heavy(installed: Path, project: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import edgevlm; dir(edgevlm)\n"
        "print(sorted({n.split('.')[0] for n in set(sys.modules) - before}"
        " - set(sys.stdlib_module_names)))"
    )
    done = python(installed, project, "-c", code)
    assert (done.stdout, done.stderr) == ("['edgevlm']\n", "")


def test_every_public_name_exists_and_no_other(installed: Path, project: Path) -> None:
    code = (
        "import edgevlm\n"
        "for name in edgevlm.__all__: assert getattr(edgevlm, name).__name__ == name\n"
        "assert set(edgevlm.__all__) <= set(dir(edgevlm))\n"
        "try: edgevlm.Nothing\n"
        "except AttributeError as missing: print(missing)"
    )
    done = python(installed, project, "-c", code)
    assert (done.stdout, done.stderr) == ("module 'edgevlm' has no attribute 'Nothing'\n", "")
