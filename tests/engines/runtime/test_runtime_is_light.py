"""The runtime rule: a built engine answers where torch, onnx and transformers do not exist."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import HERE, ROOT
from tests.pipeline import engine_of

GOLDEN = HERE / "goldens/e2e_llava15"
CHECKPOINT, IMAGE = GOLDEN / "llava-v1.5-tiny", GOLDEN / "image.png"
QUESTION = ["What is in the image?", "--image", str(IMAGE), "--max-tokens", "24"]
OTHERS_WORK = ("torch", "onnx", "transformers", "sentencepiece", "huggingface_hub", "accelerate")

# Packages are hidden the way a missing one looks: not found by the import, nor by find_spec.
WITHOUT = """
import importlib.machinery, json, sys
hidden = set(json.loads(sys.argv.pop(1)))

class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing)
sys.modules.update(dict.fromkeys(hidden))
sys.path.insert(0, "")
sys.argv[0] = "edgevlm"
from edgevlm import cli
try:
    cli.main()
finally:
    loaded = {n.split(".")[0] for n, m in sys.modules.items() if m is not None}
    assert not loaded & hidden, loaded & hidden
"""


def edgevlm(*words: str, without: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, in which some packages do not exist."""
    command = [sys.executable, "-W", "error", "-c", WITHOUT, json.dumps(without), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle and engines of both backends."""
    folder = tmp_path_factory.mktemp("light")
    for target in ("cpu", "reference"):
        engine_of(CHECKPOINT, folder, target=target)
    return folder


@pytest.mark.parametrize(
    ("target", "without"),
    [("cpu", OTHERS_WORK), ("reference", (*OTHERS_WORK, "onnxruntime"))],
)
def test_an_engine_answers_without_them(work: Path, target: str, without: tuple[str, ...]) -> None:
    done = edgevlm("run", str(work / f"engine-{target}"), *QUESTION, "--json", without=without)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    expected = np.load(GOLDEN / "outputs.npz")["greedy_ids"]
    assert answer["token_ids"] == expected.tolist()


def test_profile_inspect_and_doctor_need_them_neither(work: Path) -> None:
    engine = str(work / "engine-cpu")
    few = ["--runs", "1", "--warmup", "0", "--max-tokens", "4", "--layers", "3", "--json"]
    for words in (["profile", engine, *few], ["inspect", engine], ["doctor"]):
        done = edgevlm(*words, without=OTHERS_WORK)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("verb", "missing", "extra"),
    [("run", "onnxruntime", "cpu"), ("export", "onnx", "export"), ("build", "onnx", "export")],
)
def test_a_missing_package_is_one_error_and_its_install_command(
    work: Path, verb: str, missing: str, extra: str
) -> None:
    words = {
        "run": [str(work / "engine-cpu"), *QUESTION],
        "export": [str(CHECKPOINT), str(work / "never")],
        "build": [str(work / "bundle"), str(work / "never")],
    }[verb]
    done = edgevlm(verb, *words, "--quiet", without=(missing,))
    error, hint = done.stderr.splitlines()
    assert done.returncode == 1
    assert error.startswith("error: ")
    assert repr(missing) in error
    assert hint == f"hint: pip install 'edgevlm[{extra}]'"
    assert not (work / "never").exists()
