"""Samples of images and prompts: which are taken, which are held out, which cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgevlm.calibration import samples
from edgevlm.calibration.samples import Settings
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.errors import CalibrationError, InputError
from edgevlm.toolkit.images import decode
from edgevlm.toolkit.ops.vocabulary import Array

QUESTION = "Describe the image in detail."  # asked where images come without prompts
FEWEST = 4
_MOST_BROKEN = 0.01
_NAMED = 10  # broken images in one message; each is named as progress
_HELD_OUT = 8
_SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """One call of the whole model, or of the language model alone where there is no image.

    ids: int64 [tokens] of a text, in place of a prompt.
    """

    image: Path | None = None
    prompt: str = QUESTION
    ids: Array | None = None


@dataclass(frozen=True)
class Given:
    """Where samples come from: a folder of images, a file of prompts (JSONL), a text."""

    images: Path | None = None
    prompts: Path | None = None
    text: Path | None = None


@dataclass(frozen=True)
class Chosen:
    """Samples to calibrate with, and others to measure on."""

    calibrating: tuple[Sample, ...]
    held_out: tuple[Sample, ...]


def gather(bundle: Bundle, given: Given, settings: Settings, progress: Progress) -> Chosen:
    """The samples of a calibration: every fourth is held out, eight at most of each kind.

    Raises CalibrationError where there are too few, or more than 1 % of the images are broken.
    """
    found = _prompts(given) if given.prompts else _folder(given.images) if given.images else []
    calibrating, held = list[Sample](), list[Sample]()
    if given.prompts or given.images:
        source = given.prompts or given.images
        pairs = _decoded(_spread(found, settings.samples), progress)
        if len(pairs) < FEWEST:
            raise CalibrationError(
                f"{source} has {len(pairs)} samples, at least {FEWEST} are needed",
                hint="32 to 128 are usual: images and prompts like those the model will see",
            )
        apart = range(3, len(pairs), 4)[:_HELD_OUT]
        calibrating += [pair for i, pair in enumerate(pairs) if i not in apart]
        held += [pairs[i] for i in apart]
    if given.text is not None:
        used, kept = samples.windows_of(bundle, given.text, settings)
        calibrating += [Sample(ids=ids) for ids in used]
        held += [Sample(ids=ids) for ids in kept]
    return Chosen(tuple(calibrating), tuple(held))


def _folder(folder: Path) -> list[Sample]:
    """Every image below a folder, in the order of their names."""
    if not folder.is_dir():
        raise CalibrationError(f"{folder} is not a folder of images")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file())
    if not files:
        raise CalibrationError(
            f"{folder} has no images", hint="they are found by their endings: .jpg, .png, ..."
        )
    return [Sample(file) for file in files]


def _prompts(given: Given) -> list[Sample]:
    """The samples of a JSONL file; images are below --images, or else beside the file."""
    file = given.prompts
    assert file is not None
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise CalibrationError(f"{file} is no text in UTF-8") from None
    folder = given.images or file.parent
    numbered = [(f"{file}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    return [_prompt(where, line, folder) for where, line in numbered]


def _prompt(where: str, line: str, folder: Path) -> Sample:
    try:
        data = json.loads(line)
    except ValueError:
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
        raise CalibrationError(
            f"{where}: {line[:80]!r} is no sample",
            hint='a line is {"image": "photo.jpg", "prompt": "What is this?"}',
        )
    image, unknown = data.get("image"), sorted(data.keys() - {"image", "prompt"})
    if unknown or not (image is None or isinstance(image, str)):
        what = f"unknown key {unknown[0]!r}" if unknown else f"image = {image!r:.80}"
        raise CalibrationError(f"{where}: {what}", hint="known: image (a path), prompt")
    return Sample(None if image is None else folder / image, data["prompt"])


def _spread(found: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many, evenly spread: folders are often sorted by what images show."""
    if len(found) <= most:
        return list(found)
    return [found[i] for i in np.linspace(0, len(found) - 1, most).astype(np.int64)]


def _decoded(found: Sequence[Sample], progress: Progress) -> list[Sample]:
    """The samples whose images can be decoded; each other is named."""
    whole, broken = list[Sample](), list[str]()
    for sample in found:
        try:
            if sample.image is not None:
                decode.load(sample.image)
            whole.append(sample)
        except InputError as odd:
            broken.append(odd.message)
            progress(f"left out: {odd.message}")
    if len(broken) > _MOST_BROKEN * len(found):
        shown = "; ".join(broken[:_NAMED])
        more = f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        raise CalibrationError(
            f"{len(broken)} of {len(found)} images cannot be decoded: {shown}{more}",
            hint=f"remove or mend them: at most {_MOST_BROKEN:.0%} may be broken",
        )
    return whole
