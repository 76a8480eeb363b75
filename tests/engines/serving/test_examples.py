"""The examples that the page on serving names, as they are started there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edgevlm.engines.runtime.session import Question, Session
from edgevlm.engines.serving.limits import Limits
from tests.conftest import ROOT
from tests.engines.serving.conftest import GOLDEN
from tests.engines.serving.served import serving

IMAGE = GOLDEN / "image.png"


def example(name: str, *words: object) -> str:
    command = [sys.executable, "-m", f"examples.{name}", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_a_server_is_asked_about_a_picture(session: Session) -> None:
    expected = session.answer(Question("What is there?", IMAGE, 200, literal=True)).text
    with serving(session, Limits(slots=1)) as server:
        assert example("ask_server", IMAGE, "What is there?", server.url) == expected + "\n"


def test_a_folder_is_described(
    session: Session, engine: Path, photos: list[Path], tmp_path: Path
) -> None:
    (photos[0].parent / "8.jpg").write_bytes(b"no picture")
    words = engine, photos[0].parent, tmp_path / "job", "What is there?"
    lines = example("describe_folder", *words).split("\n")
    answer = session.answer(Question("What is there?", photos[0], 64)).text
    assert any(line.startswith(f"0.png: {answer.strip()}".split("\n")[0]) for line in lines)
    assert any(line.startswith("8.jpg: ") and "not an image" in line for line in lines)
