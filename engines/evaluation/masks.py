"""RefCOCO as masks: cIoU and gIoU, as MLCD-Seg's evaluation counts (deepglint/unicom,
mlcd_vl/downstream/eval).

A file of samples has, for each, `images` (or `image`), `conversations` of human and gpt in turns,
`segmentation` (COCO's run lengths, as a list or a list for each image) and perhaps `metadata` with
`dataset` and `split`. Every question is asked by itself, and the masks of its answers are
compared with `segmentation` one by one: a surplus mask is ignored, a missing one counts as wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from edgevlm.engines.evaluation.tasks import Request, Scores, with_defaults
from edgevlm.engines.runtime.question import Question
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.errors import ConfigError, InputError, ToolkitError
from edgevlm.toolkit.images import rle
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.terminal.console import table

IGNORED = 255  # in a truth: pixels that do not count
BACKGROUND, FOREGROUND = 0, 1
_UNION_EPS, _TOTAL_EPS = 1e-5, 1e-10
Answers = Literal["reference", "forced", "free"]
ANSWERS: tuple[Answers, ...] = ("reference", "forced", "free")


@dataclass(frozen=True)
class Overlap:
    """The masks of one sample beside its truths, float64 [2]: of background and foreground.

    accuracy: the mean over truths of intersection over union, where nothing to find counts as 1.
    """

    intersection: Array
    union: Array
    accuracy: Array


@dataclass(frozen=True)
class SegScores:
    """cIoU: all intersections over all unions; gIoU: the mean of the samples' accuracies.

    groups: the same for each dataset and split that samples name; failed: samples that could not
    be answered, with the reason.
    """

    ciou: float
    giou: float
    samples: int
    masks: int
    groups: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    failed: tuple[str, ...] = ()


def overlap(masks: Sequence[Array], truths: Sequence[Array]) -> Overlap:
    """Compare the masks of a sample with its truths, each [height, width] of 0 and 1 (or 255).

    Raises InputError where a mask and its truth differ in size, which the original resizes.
    """
    joint, either = np.zeros(2), np.zeros(2)
    accuracy = np.zeros(2)
    for mask, truth in zip(masks, truths, strict=False):
        if mask.shape != truth.shape:
            raise InputError(f"a mask of {mask.shape} is compared with one of {truth.shape}")
        shared, whole = _counts(mask, truth)
        joint += shared
        either += whole
        accuracy += shared / (whole + _UNION_EPS) + (whole == 0)
    return Overlap(joint, either, accuracy / max(len(truths), 1))


def _counts(mask: Array, truth: Array) -> tuple[Array, Array]:
    """Pixels of each class in both, and in either."""
    counted = truth != IGNORED
    found, wanted = mask.astype(np.int64)[counted], truth.astype(np.int64)[counted]
    shared = np.array([np.sum((found == c) & (wanted == c)) for c in (BACKGROUND, FOREGROUND)])
    sizes = [np.sum(found == c) + np.sum(wanted == c) for c in (BACKGROUND, FOREGROUND)]
    return shared.astype(np.float64), np.asarray(sizes, np.float64) - shared


def totals(samples: Iterable[Overlap]) -> tuple[float, float]:
    """cIoU and gIoU of samples, of the foreground."""
    every = list(samples)
    joint = sum(one.intersection[FOREGROUND] for one in every)
    either = sum(one.union[FOREGROUND] for one in every)
    accuracies = [one.accuracy[FOREGROUND] for one in every]
    return float(joint / (either + _TOTAL_EPS)), float(np.mean(accuracies)) if every else 0.0


# -- a file of samples -------------------------------------------------------------------------


@dataclass(frozen=True)
class SegSample:
    """where: in its file. turns: questions with the answers that the file gives."""

    where: str
    images: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]
    truths: tuple[Array, ...]
    group: str = ""


def read(file: Path, images: Path | None = None) -> list[SegSample]:
    """The samples of a JSON list, or of one JSON object a line; images: where their paths begin.

    Raises InputError for the first that is no such sample.
    """
    folder = images or file.parent
    return [_sample(item, where, folder) for where, item in _items(file)]


def _items(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as refused:
        raise InputError(f"{file} cannot be read: {refused}") from None
    try:
        if text.lstrip()[:1] == "[":
            for number, item in enumerate(json.loads(text)):
                yield f"{file.name}[{number}]", item
            return
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"{file.name} line {number}", json.loads(line)
    except (ValueError, RecursionError) as broken:
        raise InputError(f"{file} is not JSON: {broken}") from None


def _sample(item: Any, where: str, folder: Path) -> SegSample:
    if not isinstance(item, Mapping):
        raise InputError(f"{where} is no object")
    stated = item.get("images", item.get("image"))
    names = [stated] if isinstance(stated, str) else stated
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: images = {stated!r:.60}, expected a name or a list of names")
    turns = item.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        raise InputError(f"{where} has no conversations")
    said = [turn.get("value") if isinstance(turn, Mapping) else None for turn in turns]
    texts = [text for text in said if isinstance(text, str)]
    if len(texts) % 2 or len(texts) < len(said):
        raise InputError(f"{where}: conversations are not questions with an answer each")
    masks = item.get("segmentation") or []
    if not isinstance(masks, list):
        raise InputError(f"{where}: segmentation is no list")
    flat = chain.from_iterable(m if isinstance(m, list) else [m] for m in masks)
    try:
        truths = tuple(rle.decode(mask) for mask in flat)
    except (InputError, AttributeError) as odd:
        raise InputError(f"{where}: {odd}") from None
    stated = item.get("metadata")
    facts = stated if isinstance(stated, Mapping) else {}
    group = "/".join(str(facts[key]) for key in ("dataset", "split") if facts.get(key))
    files = tuple(folder / name for name in names)
    pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
    return SegSample(where, files, pairs, truths, group)


def refcoco_seg(
    session: Session,
    file: Path,
    *,
    images: Path | None = None,
    answers: Answers = "reference",
    template: str = "auto",
    max_tokens: int = 512,
    limit: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> SegScores:
    """Score an engine of MLCD-Seg on a file.

    answers: "reference", as the original does: masks of the answer that the file gives; "forced":
    of the answer [SEG], as its published code is told to; "free": of the model's own answer. A
    sample that cannot be answered does not stop the others. Raises ConfigError for a model without
    masks, and InputError for the file.
    """
    segmenter = session.model.segmenter
    if segmenter is None:
        raise ConfigError(
            f"{session.model.name} makes no masks", hint="build an engine of MLCD-Seg"
        )
    if answers not in ANSWERS:
        raise ConfigError(f"answers = {answers!r}", hint=f"known: {', '.join(ANSWERS)}")
    samples = read(file, images)[:limit]
    if not samples:
        raise InputError(f"{file} holds no sample")
    groups: dict[str, list[Overlap]] = {}
    failed: list[str] = []
    counted = 0
    for number, sample in enumerate(samples, 1):
        try:
            found = _masks(session, sample, answers, template, max_tokens, segmenter.token)
            groups.setdefault(sample.group, []).append(overlap(found, sample.truths))
            counted += len(sample.truths)
        except ToolkitError as odd:
            failed.append(f"{sample.where}: {odd.message}")
        progress(f"{number} of {len(samples)} samples")
    every = [one for own in groups.values() for one in own]
    if not every:
        raise InputError(f"no sample could be answered; the first: {failed[0]}")
    named = {name: totals(own) for name, own in groups.items() if name}
    return SegScores(*totals(every), len(every), counted, named, tuple(failed))


def _masks(
    session: Session,
    sample: SegSample,
    answers: Answers,
    template: str,
    max_tokens: int,
    token: str,
) -> list[Array]:
    """The masks of all questions of a sample, each asked by itself."""
    found: list[Array] = []
    for question, reference in sample.turns:
        said = {"reference": reference, "forced": token, "free": None}[answers]
        asked = Question(
            _moved(question), sample.images, max_tokens, template=template, answer=said
        )
        found += session.answer(asked).masks
    return found


def _moved(question: str) -> str:
    """A question as training showed it: its only `<image>` in front, if it stands elsewhere."""
    if question.count("<image>") != 1 or question.startswith("<image>"):
        return question
    return "<image>\n" + question.replace("<image>", "").strip()


def run(request: Request) -> Scores:
    """The task `refcoco-seg`: over all samples of a file, and of each data set that lines name."""
    request = with_defaults(request, max_tokens=512, template="auto", masks_of="reference")
    assert request.data is not None
    assert request.max_tokens is not None
    with Session.open(request.engine, threads=request.threads) as session:
        found = refcoco_seg(
            session,
            request.data,
            images=request.images,
            answers=cast(Answers, request.masks_of),
            template=request.template or "auto",
            max_tokens=request.max_tokens,
            limit=request.limit,
            progress=request.progress,
        )
    rows = [("all", found.ciou, found.giou)]
    rows += [(name, *both) for name, both in found.groups.items()]
    lines = (
        *table(("data set", "cIoU", "gIoU"), rows),
        f"{found.masks} masks of {found.samples} samples",
    )
    values = {
        "ciou": found.ciou,
        "giou": found.giou,
        "samples": found.samples,
        "masks": found.masks,
        "groups": {name: {"ciou": c, "giou": g} for name, (c, g) in found.groups.items()},
    }
    settings = {name: getattr(request, name) for name in ("max_tokens", "template", "masks_of")}
    return Scores(values, lines, (request.data,), settings, found.failed)
