"""Both demos run to their end; scenes are as they say, and answers are graded right."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edgevlm.toolkit.errors import MissingExtra, OutputError, ToolkitError
from edgevlm.toolkit.strict import to_json
from edgevlm.toolkit.terminal.console import Console
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.training.digits import commands, drawing, exam, model, page, scenes, tour
from edgevlm.training.digits.exam import KINDS
from edgevlm.training.digits.scenes import Scene
from edgevlm.training.digits.tour import Lesson, Plan
from tests.conftest import ROOT
from tests.refusals import edgevlm

SHORT = Plan((Lesson("some digits", (1, 4), 8, 2),), batch=4, calibrating=4, held_out=4, shown=4)
BY = "edgevlm of a test"


@pytest.mark.skipif(find_spec("skimage") is None, reason="the demo's photograph is scikit-image's")
def test_the_exact_demo_runs_and_its_tokens_are_the_originals(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.demo_exact", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 of 24 tokens are equal." in done.stdout
    assert "of 24 tokens are still the original's" in done.stdout
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"bundle", "engine", "engine-int8", "chelsea.png", "profile.html"}


def test_the_demo_takes_all_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("a folder")
    data, lines, _ = tour.take(out, Console(), BY, train=False, force=False, plan=SHORT)
    told = capfd.readouterr().out
    assert json.loads(to_json(data))["trained"] is False
    assert data["scores"]["int8"]["asked"] == {"naming": 1, "counting": 4, "pointing": 1}
    assert f"{1:>12}{4:>12}{1:>12}" in "\n".join(lines)  # questions that name, count and point
    written = (out / "page.html").read_text()
    assert written.count("data:image/png;base64,") == 4
    assert "http" not in written
    assert {p.name for p in out.iterdir()} == {
        *("scenes", "new", "bundle", "bundle-int8", "engine", "engine-int8", "demo.json"),
        *("answers-float32.json", "answers-int8.json", "page.html", "profile.html"),
    }
    shown = re.findall(r"^\$ ((?:.+\\\n)*.+)$", told, re.M)
    assert max(len(line) for command in shown for line in command.splitlines()) <= 92
    verbs = "export|calibrate|build|run|profile"
    assert [re.findall(rf" ({verbs}) ", command)[0] for command in shown] == (
        "export calibrate build build run run run profile".split()
    )
    assert told.count("\ntook ") == len(shown) == len(data["steps"]) == 8
    again = subprocess.run(shown[4], shell=True, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr  # a copied command works


def test_it_learns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    learning = tour.Tour(
        commands.opened(tmp_path / "x", console, BY, force=False), tmp_path / "x", SHORT, True
    )
    held_out = learning.draw()
    trained = learning.learn()
    assert [len(scene.digits) for scene in held_out] == [1, 2, 3, 4]
    assert (trained / "checkpoint.json").exists()
    assert [step for step, _ in learning.losses()] == [1, 2]
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""  # quiet
    assert f"train all --model {tmp_path / 'x/new'} " in learning.commands.steps["train-1"].command


def test_the_page_says_whether_it_was_trained(drawn: list[Scene]) -> None:
    graded = [[exam.grade(one, one.answer) for one in scenes.questions(drawn[0])]]
    scores = {"float32": exam.scores(graded[0])}
    trained = page.page(drawn[:1], graded, scores, [(1, 2.0), (2, 1.0)])
    assert "that learned digits" in trained and "polyline" in trained and "100.0%" in trained
    random = page.page(drawn[:1], graded, scores, [])
    assert "with random weights" in random and "polyline" not in random


def test_the_demo_loads_no_torch_by_itself() -> None:
    code = (
        "import sys, edgevlm.training.digits.tour; "
        "print([name for name in ('torch', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- what an earlier call made -----------------------------------------------------------------


def made(out: Path, words: str, result: Path, by: str = BY, *, force: bool = False) -> bool:
    """Whether a step is kept that makes `result`."""
    opened = commands.opened(out, Console(quiet=True), by, force=force)
    opened.make("step", words, result=result)
    return opened.steps["step"].kept


def test_a_step_is_kept_where_nothing_of_it_changed(tmp_path: Path) -> None:
    out, result = tmp_path / "demo", tmp_path / "result"
    assert not made(out, "--version", result)
    assert not made(out, "--version", result)  # there is no result
    result.touch()
    assert made(out, "--version", result)
    assert made(out, "--version", result)
    assert not made(out, "--help", result)
    assert not made(out, "--help", result, "another version")
    assert not made(out, "--help", result, "another version", force=True)
    assert made(out, "--help", result, "another version")


def test_what_follows_a_new_step_is_made_anew(tmp_path: Path) -> None:
    for kept in (False, True):
        opened = commands.opened(tmp_path / "demo", Console(quiet=True), BY, force=False)
        opened.make("first", "--version", result=tmp_path)
        opened.make("second", "--version", result=tmp_path)
        assert [step.kept for step in opened.steps.values()] == [kept, kept]
    opened = commands.opened(tmp_path / "demo", Console(quiet=True), BY, force=False)
    opened.make("first", "--help", result=tmp_path)
    opened.make("second", "--version", result=tmp_path)
    assert not any(step.kept for step in opened.steps.values())


def test_a_failed_command_ends_the_demo_with_its_error(tmp_path: Path) -> None:
    opened = commands.opened(tmp_path / "demo", Console(quiet=True), BY, force=False)
    with pytest.raises(ToolkitError, match="inspect nowhere.*does not exist") as failed:
        opened.make("step", "inspect", "nowhere", result=tmp_path)
    assert f"demo {tmp_path / 'demo'}" in failed.value.hint
    again = commands.opened(tmp_path / "demo", Console(quiet=True), BY, force=False)
    assert again.earlier["step"].seconds is None


def test_it_leaves_other_folders_alone(tmp_path: Path) -> None:
    other, file = tmp_path / "other", tmp_path / "file"
    other.mkdir()
    (other / "photo.jpg").touch()
    file.touch()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "demo.json").write_text('{"kind": "something"}')
    for place in (other, file, foreign):
        for words in (("--no-train",), ("--no-train", "--force")):
            ran = edgevlm("demo", place, *words)
            assert ran.code == 1 and "left alone" in ran.err and "ANOTHER_FOLDER" in ran.err
    assert [p.name for p in other.iterdir()] == ["photo.jpg"]
    with pytest.raises(OutputError):
        commands.opened(other, Console(), BY, force=True)


@pytest.mark.parametrize(("package", "train"), [("torch", True), ("onnxruntime", False)])
def test_what_is_missing_is_said_first(
    package: str, train: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tour, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(MissingExtra, match=package) as missing:
        tour.take(tmp_path / "out", Console(), BY, train=train, force=False)
    assert missing.value.hint.startswith("pip install 'edgevlm[demo]'")
    assert ("demo --no-train" in missing.value.hint) is train
    assert not (tmp_path / "out").exists()


def test_an_interrupt_ends_the_running_command_too(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "edgevlm.cli", "demo", str(tmp_path / "out"), "--no-train"]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    record, until = tmp_path / "out/demo.json", time.monotonic() + 60
    while not record.exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.count("error: ") == 1 and "interrupted" in told
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing of it is left
    assert json.loads(record.read_text())["steps"]["export"]["seconds"] is None


# -- digits, scenes and grades -----------------------------------------------------------------


def test_digits_are_drawn_anew_and_whole() -> None:
    rng = np.random.default_rng(0)
    drawn = [[drawing.ink(value, scenes.SIZE, rng) for _ in range(20)] for value in range(10)]
    every = [image for images in drawn for image in images]
    assert len({image.tobytes() for image in every}) == 200
    for image in every:
        assert image.shape == (scenes.SIZE, scenes.SIZE) and image.max() > 200
        rim = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert rim.max() < scenes.INK  # nothing is cut off
    again = drawing.ink(0, scenes.SIZE, np.random.default_rng(0))
    assert (again == drawn[0][0]).all()


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    rng = np.random.default_rng(3)
    return [scenes.draw(1 + n % 4, rng) for n in range(40)]


def pairs(scene: Scene) -> Iterator[tuple[scenes.Digit, scenes.Digit]]:
    for number, digit in enumerate(scene.digits):
        for other in scene.digits[:number]:
            yield digit, other


def test_boxes_are_inside_and_hold_all_the_ink(drawn: list[Scene]) -> None:
    for scene in drawn:
        covered = np.zeros_like(scene.pixels, bool)
        for digit in scene.digits:
            left, top, right, bottom = (round(corner * scenes.SIDE) for corner in digit.box)
            assert 0 <= left < right <= scenes.SIDE and 0 <= top < bottom <= scenes.SIDE
            ink = scene.pixels[top:bottom, left:right] >= scenes.INK
            edges = (ink[0], ink[-1], ink[:, 0], ink[:, -1])
            assert all(edge.any() for edge in edges)  # the box is tight
            covered[top:bottom, left:right] = True
        assert (scene.pixels[~covered] < scenes.INK).all()


def test_digits_of_a_scene_are_different_and_apart(drawn: list[Scene]) -> None:
    assert [len(scene.digits) for scene in drawn[:4]] == [1, 2, 3, 4]
    for scene in drawn:
        for digit, other in pairs(scene):
            assert digit.value != other.value
            assert scenes.overlap(digit.box, other.box) == 0


def test_a_lone_digit_is_named_and_pointed_at(drawn: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    for scene in drawn:
        kinds = sorted(one.kind for one in scenes.lesson(scene, rng))
        assert kinds == (sorted(KINDS) if len(scene.digits) == 1 else ["counting"])


def test_the_tokenizer_gives_every_text_back(drawn: list[Scene]) -> None:
    tokenizer = Tokenizer.from_text(model.tokenizer())
    unknown = tokenizer.id_of("<unk>")
    for one in (asked for scene in drawn for asked in scenes.questions(scene)):
        for text in (one.question, one.answer):
            ids = tokenizer.encode(text)
            assert unknown not in ids
            assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("[0.12,0.30,0.48,0.66]")) == 4


@pytest.mark.parametrize(
    ("kind", "answer", "truth", "right"),
    [
        ("naming", "7", "7", True),
        ("naming", "1", "7", False),
        ("naming", "", "7", False),
        ("counting", "3", "3", True),
        ("counting", "3 3", "3", False),
        ("pointing", "[0.10,0.10,0.50,0.50]", "[0.10,0.10,0.50,0.50]", True),
        ("pointing", "[0.10,0.10,0.50,0.31]", "[0.10,0.10,0.50,0.50]", True),  # 0.525
        ("pointing", "[0.10,0.10,0.50,0.29]", "[0.10,0.10,0.50,0.50]", False),  # 0.475
        ("pointing", "[0.60,0.60,0.90,0.90]", "[0.10,0.10,0.50,0.50]", False),
        ("pointing", "[0.50,0.50,0.10,0.10]", "[0.10,0.10,0.50,0.50]", False),  # inside out
        ("pointing", "[0.10,0.10,0.50]", "[0.10,0.10,0.50,0.50]", False),
        ("pointing", "7", "[0.10,0.10,0.50,0.50]", False),
        ("pointing", "[nan,nan,nan,nan]", "[0.10,0.10,0.50,0.50]", False),
    ],
)
def test_answers_are_graded(kind: str, answer: str, truth: str, right: bool) -> None:
    assert exam.is_right(kind, answer, truth) is right


def test_grades_are_counted_by_kind(drawn: list[Scene], tmp_path: Path) -> None:
    chosen = [drawn[0], drawn[1], drawn[4]]  # one, two and one digits
    asked = [one for scene in chosen for one in scenes.questions(scene)]
    wrong = {0: "9", 1: "x"}  # the first count, and the first name
    answers = [{"text": wrong.get(n, one.answer)} for n, one in enumerate(asked)]
    (tmp_path / "answers.json").write_text(json.dumps({"answers": answers}))
    graded = exam.read(tmp_path / "answers.json", chosen)
    assert [len(answers) for answers in graded] == [3, 1, 3]
    scores = exam.scores(one for answers in graded for one in answers)
    assert [scores.asked[kind] for kind in KINDS] == [2, 3, 2]
    assert [scores.right[kind] for kind in KINDS] == [1, 2, 2]
    assert scores.share("naming") == 1 / 2
