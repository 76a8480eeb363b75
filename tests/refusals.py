"""What a refusal must look like, checked after every one of them, and cases to refuse."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from edgevlm import cli
from edgevlm.toolkit.bundle import sealed
from tests.conftest import HERE

GOLDEN = HERE / "goldens/e2e_llava15"
IMAGE = GOLDEN / "image.png"
LM, TOWER = "llava-v1.5-tiny", "clip-vit-tiny"
ASK = ("What?", "--image", IMAGE, "--max-tokens", 2, "--quiet")


@dataclass(frozen=True)
class Ran:
    """A verb that ended: its exit code and output."""

    code: int
    out: str
    err: str


def edgevlm(*words: object) -> Ran:
    """The command line, in this process."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["edgevlm", *map(str, words)])
        code = cli._guarded(debug=False)
    return Ran(code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (state.st_size, state.st_mtime_ns)
    return found


def check_contract(err: str) -> tuple[str, str]:
    """The error and the hint ("" if none) of a refusal, after checking its form."""
    lines = err.splitlines()
    hint = lines.pop().removeprefix("hint: ") if lines[-1].startswith("hint: ") else ""
    error = lines.pop()
    assert error.startswith("error: "), err
    assert not [line for line in lines if line.startswith(("error:", "hint:"))], err
    for word in ("defect", "Traceback", "Warning", "Exception ignored"):
        assert word not in err, err
    assert len(error) < 700, err
    return error.removeprefix("error: "), hint


def refuses(work: Path, *words: object, code: int = 1) -> tuple[str, str]:
    """Error and hint of a verb that must be refused and leave `work` exactly as it was."""
    before = tree(work)
    ran = edgevlm(*words)
    assert (ran.code, ran.out) == (code, ""), ran
    assert tree(work) == before
    return check_contract(ran.err)


def checkpoint_in(work: Path) -> Path:
    """A copy of the tiny LLaVA-1.5 and, beside it, of its tower."""
    for name in (LM, TOWER):
        shutil.copytree(GOLDEN / name, work / name)
    return work / LM


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file; a description of ours gets the seal of what it says now."""
    data = json.loads(path.read_text())
    change(data)
    if sealed.SEAL in data:
        data[sealed.SEAL] = sealed.digest(data)
    path.write_text(json.dumps(data))
