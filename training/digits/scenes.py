"""Scenes of one to four digits, drawn as hands write them, and questions about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.training.digits import drawing

Box = tuple[float, float, float, float]  # left, top, right, bottom; 0 to 1

SIDE = 48  # pixels of a scene
SIZE = 16  # pixels of a digit's image
GRID = 8  # digits stand at multiples of so many pixels
MOST = 4  # digits of a scene
INK = 64  # a pixel belongs to a digit from this brightness on

COUNT = "How many digits are there?"
NAME = "Which digit is it?"
POINT = "Where is it?"


@dataclass(frozen=True)
class Digit:
    """A digit of a scene: what it is, and the box of its ink."""

    value: int
    box: Box


@dataclass(frozen=True)
class Scene:
    """pixels: uint8 [SIDE, SIDE]. The digits are all different, in no order."""

    pixels: Array
    digits: tuple[Digit, ...]


@dataclass(frozen=True)
class Asked:
    """A question about a scene, and its true answer."""

    kind: str
    question: str
    answer: str


def draw(count: int, rng: np.random.Generator) -> Scene:
    """A scene of `count` different digits, none of them drawn like any before."""
    while True:
        values = [int(value) for value in rng.choice(10, count, replace=False)]
        made = _placed(values, rng)
        if made is not None:
            return made


def _placed(values: Sequence[int], rng: np.random.Generator) -> Scene | None:
    """The digits at random places, apart from one another; None if there was no room."""
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    taken = np.zeros((SIDE, SIDE), bool)
    digits: list[Digit] = []
    for value in values:
        for _ in range(20):
            top, left = (int(n) * GRID for n in rng.integers(0, (SIDE - SIZE) // GRID + 1, 2))
            place = np.s_[top : top + SIZE, left : left + SIZE]
            if not taken[place].any():
                break
        else:
            return None
        ink = drawing.ink(value, SIZE, rng)
        pixels[place], taken[place] = ink, True
        rows, columns = ((ink >= INK).any(axis).nonzero()[0] for axis in (1, 0))
        corners = left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1
        box: Any = tuple(int(corner) / SIDE for corner in corners)
        digits.append(Digit(value, box))
    return Scene(pixels, tuple(digits))


def questions(scene: Scene) -> list[Asked]:
    """Every question that is asked about a scene: of a lone digit also what and where it is."""
    asked = [counted(scene)]
    if len(scene.digits) == 1:
        asked += [named(scene.digits[0]), pointed(scene.digits[0])]
    return asked


def counted(scene: Scene) -> Asked:
    """How many digits there are."""
    return Asked("counting", COUNT, str(len(scene.digits)))


def named(digit: Digit) -> Asked:
    """Which digit it is."""
    return Asked("naming", NAME, str(digit.value))


def pointed(digit: Digit) -> Asked:
    """Where it is."""
    return Asked("pointing", POINT, box_text(digit.box))


def lesson(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    """The questions of one conversation of the training data, in any order."""
    asked = questions(scene)
    return [asked[number] for number in rng.permutation(len(asked))]


def box_text(box: Box) -> str:
    """Shikra's form of a box: [0.12,0.30,0.48,0.66]."""
    return "[" + ",".join(f"{corner:.2f}" for corner in box) + "]"


def read_box(text: str) -> Box | None:
    """The inverse of box_text; None for any other text."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        left, top, right, bottom = (float(number) for number in text[1:-1].split(","))
    except ValueError:
        return None
    return left, top, right, bottom


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    areas = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return both / (areas - both) if areas > both else 0.0


# -- as files ----------------------------------------------------------------------------------


def write(folder: Path, scenes: Sequence[Scene], name: str, rng: np.random.Generator) -> Path:
    """The scenes as LLaVA's JSON and images: every scene with one conversation."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    items = []
    for number, made in enumerate(scenes):
        file = f"{name}/{number:05d}.png"
        save(made, folder / file)
        turns = []
        for at, one in enumerate(lesson(made, rng)):
            text = f"<image>\n{one.question}" if at == 0 else one.question
            turns.append({"from": "human", "value": text})
            turns.append({"from": "gpt", "value": one.answer})
        items.append({"id": f"{name}-{number}", "image": file, "conversations": turns})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(items))
    return path


def save(scene: Scene, path: Path) -> None:
    """The scene as a PNG."""
    from PIL import Image

    Image.fromarray(scene.pixels).save(path)
