"""The tower of benchmarks/trained.py: its features in 8 bits beside those in float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import questions
from edgevlm import Session
from edgevlm.toolkit.images import decode, views
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.ops.vocabulary import Array

PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png",
          "hubble_deep_field.jpg", "ihc.png", "retina.jpg")  # fmt: skip
CROPS = (2, 4)  # rows and columns that a photo is cut into
PICTURES = 64  # of CIFAR-10, whose tokens are compared
TRAINING, TEST = 1000, 1500
PENALTY = 1e-2  # of the ridge regression, of standardised features


@dataclass(frozen=True)
class Nearness:
    """Cosines between tokens and those in float; rms: of the difference, over that of float's."""

    pictures: int
    tokens: int
    mean: float
    least: float
    rms: float


@dataclass(frozen=True)
class Probe:
    """A linear classifier of ten classes that was made on float's features.

    error: the standard error of the difference between an engine's accuracy and float's.
    """

    accuracy: float
    same: float
    error: float


def features(engine: Path, pictures: Sequence[Any]) -> Array:
    """The encoder's output for each picture: [N, tokens, width]."""
    found = []
    with Session.open(engine, threads=1) as session:
        record = next(r for r in session.engine.components if r.name.startswith("encoder."))
        source = {edge.target: edge.source for edge in session.engine.edges}
        (port,), (output,) = record.inputs, record.outputs
        name = source[f"{record.name}:{port.name}"].removeprefix("images.")
        for picture in pictures:
            inputs = {port.name: pixels(session.model.images, name, [picture])}
            outputs = session._runners[record.name].run(inputs)
            found.append(np.array(outputs[output.name][0]))
    return np.stack(found)


def pixels(rules: ImageRules, encoder: str, pictures: Sequence[Any]) -> Array:
    """What an encoder sees of each picture: [N, 3, height, width]."""
    loaded = [decode.load(picture).rgb for picture in pictures]
    return np.stack([views.prepare(rgb, rules, count=1).pixels[0][encoder] for rgb in loaded])


def photos() -> list[Any]:
    """Crops of the photographs that scikit-image installs; empty where it is not installed."""
    from PIL import Image

    spec = util.find_spec("skimage")
    if spec is None or spec.origin is None:
        return []
    crops, (rows, columns) = [], CROPS
    for name in PHOTOS:
        file = Path(spec.origin).parent / "data" / name
        if file.is_file():
            photo = Image.open(file).convert("RGB")
            wide, high = photo.width // columns, photo.height // rows
            corners = [(x * wide, y * high) for y in range(rows) for x in range(columns)]
            crops += [photo.crop((x, y, x + wide, y + high)) for x, y in corners]
    return crops


def nearness(plain: Array, found: Array) -> Nearness:
    """How near features are to float's."""
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (plain, found))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines = (a * b).sum(-1) / lengths
    rms = np.linalg.norm(a - b) / np.linalg.norm(a)
    shape = (len(plain), len(a))
    return Nearness(*shape, float(cosines.mean()), float(cosines.min()), float(rms))


class Classifier:
    """Ridge regression on the means of a picture's tokens, standardised."""

    def __init__(self, training: Array, labels: Array) -> None:
        means = training.mean(1, dtype=np.float64)
        self._middle, self._spread = means.mean(0), means.std(0) + 1e-9
        x = self._inputs(training)
        targets = np.eye(int(labels.max()) + 1)[labels]
        penalty = PENALTY * len(x) * np.eye(x.shape[1])
        self._weights = np.linalg.solve(x.T @ x + penalty, x.T @ targets)

    def _inputs(self, found: Array) -> Array:
        x = (found.mean(1, dtype=np.float64) - self._middle) / self._spread
        return np.concatenate([x, np.ones((len(x), 1))], 1)

    def classes(self, found: Array) -> Array:
        """The class of each picture."""
        return np.asarray((self._inputs(found) @ self._weights).argmax(-1))


def probe(plain: Array, said: Array, labels: Array) -> Probe:
    """plain, said: the classes that a classifier sees in float's and in an engine's features."""
    right = (said == labels).astype(float)
    differences = right - (plain == labels)
    error = differences.std(ddof=1) / len(labels) ** 0.5
    return Probe(float(right.mean()), float((plain == said).mean()), float(error))


def cifar(folder: Path) -> tuple[questions.Pictures, questions.Pictures]:
    """Pictures to make a classifier with, and held-out ones."""
    return (
        questions.read(folder / "train.npz").first(TRAINING),
        questions.read(folder / "test.npz").first(TEST),
    )
