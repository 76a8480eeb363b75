"""VQA accuracy of short answers (Antol et al., "VQA", arXiv 1505.00468).

An answer of ten people counts fully if three of the other nine gave it too: for each of the given
answers min(1, matches among the others / 3), averaged. Texts are compared after the normalisation
of the official scorer (github.com/GT-Vision-Lab/VQA): punctuation, numbers in words, articles,
contractions. It is applied to all answers here, as the scorers of TextVQA do; the official one
leaves out a question whose people all wrote the same text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgevlm.engines.evaluation import samples
from edgevlm.engines.evaluation.samples import Sample
from edgevlm.engines.evaluation.tasks import Request, Scores, with_defaults
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.strict import Reader

SUFFIX = "\nAnswer the question using a single word or phrase."
KEYS = "image, question, answers (a list) or answer, id"
_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{name: str(value) for value, name in enumerate(_NUMBERS)}}
_ARTICLES = ("a", "an", "the")
# The words whose spelling without an apostrophe the official scorer mends. In those with two, one
# of them is missing. "lets", "shes" and "id" are not among them.
_ONE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's "
    "how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've "
    "o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll "
    "someone's something'd something'll that's there'd there're there's they'd they'll they're "
    "they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
    "you'll you're you've"
).split()
_TWO = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've "
    "someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll "
    "you'd've 'ow's'at y'all'd've"
).split()


def _spellings(word: str) -> list[str]:
    """The word without one of its apostrophes, each in turn."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {spelling: word for word in (*_ONE, *_TWO) for spelling in _spellings(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # as the official scorer has it


def normalised(text: str) -> str:
    """A text as the official scorer compares it."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [_DIGITS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark next to a space is dropped, others become a space; all are dropped where a comma
    stands between digits. A period stays before a digit.
    """
    found = text
    in_numbers = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        dropped = in_numbers or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if dropped else " ")
    return re.sub(r"\.(?!\d)", "", found)


def accuracy(answer: str, given: Sequence[str]) -> float:
    """Of one answer, beside those that people gave; a single one must be matched."""
    text, people = normalised(answer), [normalised(one) for one in given]
    if len(people) == 1:
        return float(text == people[0])
    matches = people.count(text)
    return sum(min(1.0, (matches - (one == text)) / 3) for one in people) / len(people)


def run(request: Request) -> Scores:
    """The mean accuracy over the samples of a file."""
    request = with_defaults(request, max_tokens=128, suffix=SUFFIX, template="auto")
    found = samples.ask(request, samples.read(request, KEYS, _sample), _score)
    mean = samples.mean(found, "accuracy")
    values = {"accuracy": round(mean, 6), "samples": len(found.scores)}
    lines = (f"accuracy    {mean:.2%} of {len(found.scores)} questions",)
    assert request.data is not None
    return Scores(values, lines, (request.data,), samples.settings(request), found.failed)


def _score(text: str, given: tuple[str, ...]) -> dict[str, Any]:
    return {"accuracy": accuracy(text, given)}


def _sample(r: Reader, folder: Path) -> Sample[tuple[str, ...]]:
    question, image = r.take("question", str), folder / r.take("image", str)
    several, single = r.optional("answers", list), r.optional("answer", str)
    if (several is None) == (single is None):
        raise InputError(f"{r.where} needs either answers or answer")
    given = [single] if several is None else several
    if not given or not all(isinstance(text, str) for text in given):
        raise InputError(f"{r.where}: answers = {given!r:.80}, expected a list of texts")
    return Sample(r.where, samples.identity(r), question, image, tuple(map(str, given)))
