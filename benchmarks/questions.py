"""Questions on labelled pictures as a LLaVA data set, and held-out ones with their answers."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.greedy import Asked

FILE = "questions.json"
NAMING = "What is in the picture?"


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures: the bytes of their JPEG files, and for each the index of its name."""

    files: tuple[bytes, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]

    def first(self, count: int) -> Pictures:
        """The first `count` pictures."""
        return Pictures(self.files[:count], self.labels[:count], self.names)


@dataclass(frozen=True)
class Question:
    """A held-out question. kind: "naming" or "yes-no"."""

    asked: Asked
    answer: str
    kind: str


def read(path: Path) -> Pictures:
    """From an .npz file with the arrays jpeg, offsets, labels and names."""
    arrays = np.load(path, allow_pickle=False)
    joined, ends = arrays["jpeg"].tobytes(), arrays["offsets"].tolist()
    files = tuple(joined[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True))
    return Pictures(files, tuple(arrays["labels"].tolist()), tuple(arrays["names"].tolist()))


def asks_for(subject: str) -> str:
    """A question whose answer is yes or no."""
    return f"Is there {'an' if subject[0] in 'aeiou' else 'a'} {subject}?"


def texts(names: Sequence[str], subject: str) -> list[str]:
    """All questions and answers, for a tokenizer; an answer follows a blank in some templates."""
    words = [NAMING, asks_for(subject), *names, "yes", "no"]
    return [*words, *(f" {word}" for word in words)]


def of(pictures: Pictures, subject: str, seed: int = 0) -> list[Question]:
    """What every picture shows; and of those that show `subject`, and as many others, if they do.

    The questions on one picture come one after the other.
    """
    wanted = pictures.names.index(subject)
    labels = np.array(pictures.labels)
    others = np.random.default_rng(seed).permutation(np.flatnonzero(labels != wanted))
    chosen = {*np.flatnonzero(labels == wanted).tolist()}
    chosen |= {*others[: len(chosen)].tolist()}
    found = []
    for number, (file, label) in enumerate(zip(pictures.files, pictures.labels, strict=True)):
        found.append(Question(Asked(file, NAMING), pictures.names[label], "naming"))
        if number in chosen:
            answer = "yes" if label == wanted else "no"
            found.append(Question(Asked(file, asks_for(subject)), answer, "yes-no"))
    return found


def write(folder: Path, pictures: Pictures, subject: str, seed: int = 0) -> Path:
    """The data set `folder`/FILE with one question a sample; every picture also mirrored.

    The file's path is returned.
    """
    (folder / "images").mkdir(parents=True)
    samples: list[dict[str, Any]] = []
    number = -1
    for question in of(pictures, subject, seed):
        picture = question.asked.picture
        number += question.kind == "naming"  # which is every picture's first question
        for side in "ab":
            name = f"images/{number:05d}{side}.jpg"
            if question.kind == "naming":
                (folder / name).write_bytes(picture if side == "a" else _mirrored(picture))
            samples.append(_sample(f"{number}{side} {question.kind}", name, question))
    path = folder / FILE
    path.write_text(json.dumps(samples), encoding="utf-8")
    return path


def _sample(name: str, image: str, question: Question) -> dict[str, Any]:
    asked = {"from": "human", "value": f"<image>\n{question.asked.question}"}
    turns = [asked, {"from": "gpt", "value": question.answer}]
    return {"id": name, "image": image, "conversations": turns}


def _mirrored(file: bytes) -> bytes:
    from PIL import Image, ImageOps

    out = io.BytesIO()
    ImageOps.mirror(Image.open(io.BytesIO(file))).save(out, "JPEG", quality=95)
    return out.getvalue()
