"""Both demos run to their end; scenes are as they say, and answers are graded right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edgevlm.toolkit.text.tokenizer import Tokenizer
from examples import demo
from examples.demo import Lesson, Plan
from examples.digits import exam, model, scenes
from examples.digits.exam import KINDS
from examples.digits.scenes import Scene
from tests.conftest import ROOT

digits = pytest.mark.skipif(find_spec("sklearn") is None, reason="the digits are scikit-learn's")


@pytest.mark.skipif(find_spec("skimage") is None, reason="the demo's photograph is scikit-image's")
def test_the_exact_demo_runs_and_its_tokens_are_the_originals(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.demo_exact", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 of 24 tokens are equal." in done.stdout
    assert "of 24 tokens are still the original's" in done.stdout
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"bundle", "engine", "engine-int8", "chelsea.png", "profile.html"}


@digits
def test_the_learning_demo_takes_all_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lessons = (Lesson("one digit", (1,), 8, 2, 1e-3), Lesson("several digits", (1, 4), 8, 2, 1e-3))
    monkeypatch.setattr(sys, "argv", ["demo", str(tmp_path)])
    assert demo.main(Plan(lessons, batch=4, held_out=4, shown=4)) == 0
    told = capfd.readouterr().out
    answers = 4 + 2  # every scene is counted, the lone digit is named and pointed at
    assert f"{answers} answers in" in told
    assert "4 steps in" in told
    for name in ("float32", "int8"):
        assert f"\n{name} " in told
    assert f"{1:>12}{4:>12}{1:>12}" in told  # questions that name, count and point
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page.replace("http-equiv", "")
    assert {p.name for p in tmp_path.iterdir()} == {
        *("bundle", "engine", "engine-int8", "page.html", "profile.html", "training"),
    }


@pytest.fixture(scope="module")
def made() -> list[Scene]:
    pytest.importorskip("sklearn")
    images, values, training, _ = scenes.split_digits()
    rng = np.random.default_rng(3)
    turns = (0.0, scenes.TURN)
    return [
        scenes.scene(images, values, training, 1 + n % 4, rng, turn=turns[n % 2]) for n in range(40)
    ]


def pairs(scene: Scene) -> Iterator[tuple[scenes.Digit, scenes.Digit]]:
    for number, digit in enumerate(scene.digits):
        for other in scene.digits[:number]:
            yield digit, other


def test_boxes_are_inside_and_hold_all_the_ink(made: list[Scene]) -> None:
    for scene in made:
        covered = np.zeros_like(scene.pixels, bool)
        for digit in scene.digits:
            left, top, right, bottom = (round(corner * scenes.SIDE) for corner in digit.box)
            assert 0 <= left < right <= scenes.SIDE and 0 <= top < bottom <= scenes.SIDE
            ink = scene.pixels[top:bottom, left:right] >= scenes.INK
            edges = (ink[0], ink[-1], ink[:, 0], ink[:, -1])
            assert all(edge.any() for edge in edges)  # the box is tight
            covered[top:bottom, left:right] = True
        assert (scene.pixels[~covered] < scenes.INK).all()


def test_digits_of_a_scene_are_different_and_apart(made: list[Scene]) -> None:
    assert [len(scene.digits) for scene in made[:4]] == [1, 2, 3, 4]
    for scene in made:
        for digit, other in pairs(scene):
            assert digit.value != other.value
            assert scenes.overlap(digit.box, other.box) == 0


@digits
def test_held_out_digits_are_in_no_training_scene(made: list[Scene]) -> None:
    images, values, training, held = scenes.split_digits()
    assert len(training) + len(held) == len(images) == 1797
    assert not set(training) & set(held)
    assert {digit.image for scene in made for digit in scene.digits} <= set(training)
    drawn = {images[number].tobytes() for number in training}
    twins = [number for number in held if images[number].tobytes() in drawn]
    assert twins == []
    assert set(values[held]) == set(range(10))


def test_a_lone_digit_is_named_and_pointed_at(made: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    for scene in made:
        kinds = sorted(one.kind for one in scenes.lesson(scene, rng))
        assert kinds == (sorted(KINDS) if len(scene.digits) == 1 else ["counting"])


def test_the_tokenizer_gives_every_text_back(made: list[Scene]) -> None:
    tokenizer = Tokenizer.from_text(model.tokenizer())
    unknown = tokenizer.id_of("<unk>")
    for one in (asked for scene in made for asked in scenes.questions(scene)):
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


def test_grades_are_counted_by_kind(made: list[Scene], tmp_path: Path) -> None:
    chosen = [made[0], made[1], made[4]]  # one, two and one digits
    asked = [one for scene in chosen for one in scenes.questions(scene)]
    wrong = {0: "9", 1: "x"}  # the first count, and the first name
    lines = [json.dumps({"text": wrong.get(n, one.answer)}) for n, one in enumerate(asked)]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines) + "\n")
    graded = exam.read(tmp_path / "answers.jsonl", chosen)
    assert [len(answers) for answers in graded] == [3, 1, 3]
    scores = exam.scores(one for answers in graded for one in answers)
    assert [scores.asked[kind] for kind in KINDS] == [2, 3, 2]
    assert [scores.right[kind] for kind in KINDS] == [1, 2, 2]
    assert scores.share("naming") == 1 / 2
