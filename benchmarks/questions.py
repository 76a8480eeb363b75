"""Questions on labelled pictures as a LLaVA data set, and held-out ones with their answers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def asks_for(name: str) -> str:
    """A question whose answer is yes or no."""
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name}?"


def texts(names: Sequence[str]) -> list[str]:
    """All questions and answers, for a tokenizer; an answer follows a blank in some templates."""
    words = [NAMING, *map(asks_for, names), *names, "yes", "no"]
    return [*words, *(f" {word}" for word in words)]


def held_out(pictures: Pictures, seed: int = 0) -> list[Question]:
    """Two questions on each picture: what it shows, and whether it shows something; half do."""
    draw = np.random.default_rng(seed)
    found = []
    for number, (file, label) in enumerate(zip(pictures.files, pictures.labels, strict=True)):
        there = number % 2 == 0
        name = pictures.names[label if there else _other(draw, label, len(pictures.names))]
        found.append(Question(Asked(file, NAMING), pictures.names[label], "naming"))
        answer = "yes" if there else "no"
        found.append(Question(Asked(file, asks_for(name)), answer, "yes-no"))
    return found


def write(folder: Path, pictures: Pictures, seed: int = 0) -> Path:
    """The data set `folder`/FILE: every picture as it is, and mirrored.

    A conversation has both questions in either order. The file's path is returned.
    """
    draw = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    samples = []
    for number, (file, label) in enumerate(zip(pictures.files, pictures.labels, strict=True)):
        for side, data in (("a", file), ("b", _mirrored(file))):
            name = f"images/{number:05d}{side}.jpg"
            (folder / name).write_bytes(data)
            rounds = list(_rounds(draw, pictures.names, label))
            rounds[0] = (f"<image>\n{rounds[0][0]}", rounds[0][1])
            turns = [
                {"from": speaker, "value": text}
                for pair in rounds
                for speaker, text in zip(("human", "gpt"), pair, strict=True)
            ]
            samples.append({"id": f"{number}{side}", "image": name, "conversations": turns})
    path = folder / FILE
    path.write_text(json.dumps(samples), encoding="utf-8")
    return path


def _rounds(
    draw: np.random.Generator, names: Sequence[str], label: int
) -> Iterator[tuple[str, str]]:
    """A question and its answer, twice; either comes first in half of the conversations."""
    there, naming_first = draw.random() < 0.5, draw.random() < 0.5
    name = names[label if there else _other(draw, label, len(names))]
    naming, asking = (NAMING, names[label]), (asks_for(name), "yes" if there else "no")
    yield from (naming, asking) if naming_first else (asking, naming)


def _other(draw: np.random.Generator, label: int, count: int) -> int:
    """Another label."""
    return (label + int(draw.integers(1, count))) % count


def _mirrored(file: bytes) -> bytes:
    from PIL import Image, ImageOps

    out = io.BytesIO()
    ImageOps.mirror(Image.open(io.BytesIO(file))).save(out, "JPEG", quality=95)
    return out.getvalue()
