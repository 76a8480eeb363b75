"""RefCOCO: the box of a described region, scored as two published programs do.

Both take pixels [x1, y1, x2, y2] of the image as the truth, in float32.

convllava (github.com/alibaba/conv-llava): the first four numbers in brackets, fractions of the
padded square's side, or thousandths where they add up to 4 or more; a hit has an IoU of 0.5 at
least. mmfuser (github.com/yuecao0119/MMFuser): the first `[[...]]`, which must be JSON, over
`box_scale` (999); fractions of width and height, or with square_pad of the padded square's side; a
hit has an IoU above 0.5. An answer without a box is [0, 0, 0, 0] before padding is taken off.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.engines.evaluation import samples
from edgevlm.engines.evaluation.samples import Sample
from edgevlm.engines.evaluation.tasks import Request, Scores, with_defaults
from edgevlm.toolkit.errors import ConfigError, InputError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.strict import Reader
from edgevlm.toolkit.terminal.console import table

KEYS = "image, sent (or prompt), bbox, width and height, category, id"
PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: {}."
SCORERS = ("convllava", "mmfuser")
BOX_SCALE = 999.0
_FOUR = re.compile(r"\[+([^\n]*?),([^\n]*?),([^\n]*?),([^\n]*?)\]")
_DOUBLE = re.compile(r"\[\[.*?\]\]")


@dataclass(frozen=True)
class Truth:
    """bbox: pixels [x1, y1, x2, y2] of an image of width x height."""

    bbox: tuple[float, float, float, float]
    width: int
    height: int
    category: str = ""


def convllava_box(answer: str, width: int, height: int) -> Array:
    """The box of an answer in pixels, float32 [4]."""
    box = np.asarray(_four_numbers(answer), np.float32)
    if box.sum() >= 4:
        box = box / np.float32(1000)
    return _unpadded(box * np.float32(max(width, height)), width, height)


def mmfuser_box(answer: str, width: int, height: int, scale: float, square_pad: bool) -> Array:
    """The same by the other program."""
    box = np.asarray(_double_brackets(answer), np.float32) / np.float32(scale)
    if square_pad:
        return _unpadded(box * np.float32(max(width, height)), width, height)
    return np.asarray(box * np.asarray([width, height] * 2, np.float32))


def _four_numbers(answer: str) -> list[float]:
    match = _FOUR.search(answer)
    try:
        found = [float(field) for field in match.groups()] if match else []
    except ValueError:
        found = []
    return found if len(found) == 4 and all(map(math.isfinite, found)) else [0.0] * 4


def _double_brackets(answer: str) -> list[float]:
    match = _DOUBLE.search(answer)
    try:
        found = json.loads(match[0])[0] if match else []
        numbers = [float(value) for value in found]
    except (ValueError, TypeError, RecursionError):
        numbers = []
    return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else [0.0] * 4


def _unpadded(box: Array, width: int, height: int) -> Array:
    """From pixels of the padded square to those of the image in its middle."""
    left, top = max(height - width, 0) // 2, max(width - height, 0) // 2
    return np.asarray(box - np.asarray([left, top] * 2, np.float32))


def iou(a: Array, b: Array) -> float:
    """Intersection over union of two boxes [x1, y1, x2, y2], 0 where they do not meet."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    shared = np.prod(np.maximum(high - low, np.float32(0)))
    areas = [np.prod(box[2:] - box[:2]) for box in (a, b)]
    union = areas[0] + areas[1] - shared
    return float(shared / union) if union else 0.0


def hit(answer: str, truth: Truth, scorer: str, scale: float, square_pad: bool) -> dict[str, Any]:
    """The score of one answer: `box` in pixels, `iou`, `hit`, `category`."""
    expected = np.asarray(truth.bbox, np.float32)
    if scorer == "convllava":
        box = convllava_box(answer, truth.width, truth.height)
    else:
        box = mmfuser_box(answer, truth.width, truth.height, scale, square_pad)
    found = iou(box, expected)
    right = found >= 0.5 if scorer == "convllava" else found > 0.5
    values = [round(float(x), 3) for x in box]
    return {"box": values, "iou": found, "hit": right, "category": truth.category}


def run(request: Request) -> Scores:
    """The share of hits over all samples of a file, and of each category where lines name one."""
    scorer, scale = _settled(request)
    request = with_defaults(request, max_tokens=100, template="auto")
    read = samples.read(request, KEYS, _sample)
    score = partial(hit, scorer=scorer, scale=scale, square_pad=request.square_pad)
    found = samples.ask(request, read, score)
    groups: dict[str, list[bool]] = {}
    for one in found.scores:
        groups.setdefault(one["category"], []).append(one["hit"])
    named = {name: sum(hits) / len(hits) for name, hits in groups.items() if name}
    every, overlap = samples.mean(found, "hit"), samples.mean(found, "iou")
    values = {
        "accuracy": round(every, 6),
        "mean_iou": round(overlap, 6),
        "samples": len(found.scores),
        "scorer": scorer,
        "categories": {name: round(share, 6) for name, share in named.items()},
    }
    rows = [("all", len(found.scores), every)]
    rows += [(name, len(groups[name]), share) for name, share in named.items()]
    assert request.data is not None
    used = {**samples.settings(request), "scorer": scorer}
    if scorer == "mmfuser":
        used |= {"box_scale": scale, "square_pad": request.square_pad}
    lines = tuple(table(("category", "samples", "accuracy"), rows))
    return Scores(values, lines, (request.data,), used, found.failed)


def _settled(request: Request) -> tuple[str, float]:
    """The scorer and its scale. Raises ConfigError for what cannot be."""
    scorer = request.scorer or SCORERS[0]
    if scorer not in SCORERS:
        raise ConfigError(f"--scorer {scorer!r} is unknown", hint=f"known: {', '.join(SCORERS)}")
    if scorer == "convllava" and (request.box_scale is not None or request.square_pad):
        raise ConfigError(
            "--box-scale and --square-pad are the other scorer's", hint="add --scorer mmfuser"
        )
    scale = BOX_SCALE if request.box_scale is None else request.box_scale
    if not (math.isfinite(scale) and scale > 0):
        raise ConfigError(f"--box-scale {scale} is not a number above 0")
    return scorer, scale


def _sample(r: Reader, folder: Path) -> Sample[Truth]:
    image = folder / r.take("image", str)
    sent, prompt = r.optional("sent", str), r.optional("prompt", str)
    if (sent is None) == (prompt is None):
        raise InputError(f"{r.where} needs either sent or prompt")
    width, height = r.count("width"), r.count("height")
    truth = Truth(_bbox(r), width, height, r.take("category", str, ""))
    text = PROMPT.format(sent) if prompt is None else prompt
    return Sample(r.where, samples.identity(r), text, image, truth)


def _bbox(r: Reader) -> tuple[float, float, float, float]:
    given: Sequence[Any] = r.take("bbox", list)
    numbers = [v for v in given if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(given) != 4 or len(numbers) != 4:
        raise InputError(f"{r.where}: bbox = {given!r:.80}, expected [x1, y1, x2, y2] in pixels")
    x1, y1, x2, y2 = map(float, numbers)
    if not (x1 < x2 and y1 < y2):
        raise InputError(f"{r.where}: bbox = {given!r:.80}, expected x1 < x2 and y1 < y2")
    return x1, y1, x2, y2
