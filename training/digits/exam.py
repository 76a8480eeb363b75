"""Questions about held-out scenes as a request file, and grades for what an engine answered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevlm.training.digits.scenes import Asked, Scene, overlap, questions, read_box, save

KINDS = ("naming", "counting", "pointing")
HALF = 0.5  # a box counts from this overlap on, intersection over union


@dataclass(frozen=True)
class Graded:
    """One question with the engine's answer, the true one, and whether the answer counts."""

    kind: str
    question: str
    answer: str
    truth: str
    right: bool


@dataclass(frozen=True)
class Scores:
    """Right answers and questions by kind."""

    right: Mapping[str, int]
    asked: Mapping[str, int]

    def share(self, kind: str) -> float:
        """Of right answers; 0 where nothing was asked."""
        return self.right[kind] / max(self.asked[kind], 1)


def write(folder: Path, scenes: Sequence[Scene]) -> Path:
    """A request file for `edgevlm run --input`: every question about every scene by itself."""
    (folder / "exam").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(scenes):
        save(scene, folder / f"exam/{number:05d}.png")
        for one in questions(scene):
            request = {
                "id": number,
                "prompt": one.question,
                "image": f"exam/{number:05d}.png",
                "max_tokens": 8,
            }
            lines.append(json.dumps(request) + "\n")
    path = folder / "exam.jsonl"
    path.write_text("".join(lines))
    return path


def write_samples(folder: Path, name: str, scenes: Sequence[Scene]) -> Path:
    """Questions for `edgevlm calibrate --prompts`: the last one about every scene."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(scenes):
        file = f"{name}/{number:05d}.png"
        save(scene, folder / file)
        lines.append(json.dumps({"image": file, "prompt": questions(scene)[-1].question}) + "\n")
    path = folder / f"{name}.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read(answers: Path, scenes: Sequence[Scene]) -> list[list[Graded]]:
    """What an engine answered about each scene, graded; answers: what `edgevlm run --json` printed
    for the request file.
    """
    entries = json.loads(answers.read_text(encoding="utf-8"))["answers"]
    texts = iter(entry["text"].strip() for entry in entries)
    return [[grade(one, next(texts)) for one in questions(scene)] for scene in scenes]


def grade(asked: Asked, answer: str) -> Graded:
    """An answer with its grade."""
    right = is_right(asked.kind, answer, asked.answer)
    return Graded(asked.kind, asked.question, answer, asked.answer, right)


def is_right(kind: str, answer: str, truth: str) -> bool:
    """Whether an answer counts: equal to the truth, or a box that overlaps it by half."""
    if kind != "pointing":
        return answer == truth
    pointed, true = read_box(answer), read_box(truth)
    return pointed is not None and true is not None and overlap(pointed, true) >= HALF


def scores(graded: Iterable[Graded]) -> Scores:
    """Counts by kind."""
    right, asked = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for one in graded:
        asked[one.kind] += 1
        right[one.kind] += one.right
    return Scores(right, asked)
