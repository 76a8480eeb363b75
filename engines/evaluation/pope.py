"""POPE: does a model see objects that are not there (Li et al., arXiv 2305.10355).

An answer means no if its first sentence has the word "No", "no" or "not", and yes otherwise, as
LLaVA's scorer reads it (llava/eval/eval_pope.py). "yes" is the positive class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgevlm.engines.evaluation import samples
from edgevlm.engines.evaluation.samples import Sample
from edgevlm.engines.evaluation.tasks import Request, Scores, with_defaults
from edgevlm.engines.evaluation.vqa import SUFFIX
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.strict import Reader
from edgevlm.toolkit.terminal.console import table

KEYS = "image, text (or question), label (yes or no), category, id"
_NO = {"No", "no", "not"}
_COLUMNS = ("samples", "accuracy", "precision", "recall", "f1", "yes_ratio")


def says_yes(answer: str) -> bool:
    """Whether an answer is read as yes."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not _NO.intersection(words)


def scores(pairs: Iterable[tuple[bool, bool]]) -> dict[str, float]:
    """Of (answer, label) pairs. A ratio without any case is 0."""
    counts = Counter(pairs)
    hits, alarms = counts[True, True], counts[True, False]
    misses, rejections = counts[False, True], counts[False, False]
    total = hits + alarms + misses + rejections
    precision, recall = _ratio(hits, hits + alarms), _ratio(hits, hits + misses)
    return {
        "samples": total,
        "accuracy": _ratio(hits + rejections, total),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(hits + alarms, total),
    }


def _ratio(part: float, whole: float) -> float:
    return round(part / whole, 6) if whole else 0.0


def run(request: Request) -> Scores:
    """Over all samples of a file, and of each category where lines name one."""
    request = with_defaults(request, max_tokens=128, suffix=SUFFIX, template="auto")
    found = samples.ask(request, samples.read(request, KEYS, _sample), _score)
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for one in found.scores:
        groups.setdefault(one["category"], []).append((one["yes"], one["label"]))
    every = scores(pair for pairs in groups.values() for pair in pairs)
    named = {name: scores(pairs) for name, pairs in groups.items() if name}
    rows = [("all", *every.values()), *((name, *s.values()) for name, s in named.items())]
    lines = tuple(table(("category", *_COLUMNS), rows))
    values: dict[str, Any] = {**every, "categories": named}
    assert request.data is not None
    return Scores(values, lines, (request.data,), samples.settings(request), found.failed)


def _score(text: str, truth: tuple[bool, str]) -> dict[str, Any]:
    return {"yes": says_yes(text), "label": truth[0], "category": truth[1]}


def _sample(r: Reader, folder: Path) -> Sample[tuple[bool, str]]:
    image = folder / r.take("image", str)
    text, question = r.optional("text", str), r.optional("question", str)
    if (text is None) == (question is None):
        raise InputError(f"{r.where} needs either text or question")
    label = r.choice("label", ("yes", "no"))
    category = r.take("category", str, "")
    prompt = text if question is None else question
    assert prompt is not None
    return Sample(r.where, samples.identity(r), prompt, image, (label == "yes", category))
