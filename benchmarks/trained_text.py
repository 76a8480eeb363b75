"""The language models of benchmarks/trained.py: scored on text, and asked plain questions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgevlm import Question, Session
from edgevlm.toolkit.ops.vocabulary import Array

ANSWER = 24  # tokens
QUESTIONS = {  # and a word of the right answer
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Egypt?": "Cairo",
    "What color is the sky on a clear day?": "blue",
    "What color is grass?": "green",
    "What color is a ripe banana?": "yellow",
    "What color do you get by mixing blue and yellow?": "green",
    "What is 2 + 2?": "4",
    "What is 10 minus 3?": "7",
    "What is 5 times 6?": "30",
    "What is the opposite of hot?": "cold",
    "What is the opposite of big?": "small",
    "What is the opposite of early?": "late",
    "How many days are in a week?": "7|seven",
    "How many legs does a spider have?": "8|eight",
    "Which planet do we live on?": "Earth",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "What is frozen water called?": "ice",
    "Which animal says meow?": "cat",
}
Read = Callable[[Session, Array], Array]


@dataclass(frozen=True)
class Score:
    """On text. growth: of the perplexity against float, 0.05 for 5 %; error: its standard error, as
    the windows differ. kl: mean divergence from float in nats; same_top_1: the likeliest token.
    """

    tokens: int
    perplexity: float
    growth: float
    error: float
    kl: float
    same_top_1: float


# -- text ----------------------------------------------------------------------------------------


def at_once(session: Session, window: Array) -> Array:
    """Log probabilities [S - 1, vocab] of the tokens after each but the last, of one call."""
    found = _run(session, window, 0, np.arange(len(window)), session.new_state())
    return _normal(found[:-1])


def as_run(session: Session, window: Array) -> Array:
    """The same of the second half, as an engine runs: one half a prompt, then single tokens."""
    half, state = len(window) // 2, session.new_state()
    rows = [_run(session, window[:half], 0, np.asarray([half - 1]), state)[0]]
    for at in range(half, len(window) - 1):
        rows.append(_run(session, window[at : at + 1], at, np.zeros(1, np.int64), state)[0].copy())
    return _normal(np.stack(rows))


def _run(session: Session, ids: Array, start: int, score: Array, state: object) -> Array:
    width: int = session.model.lm.config.hidden_size
    inputs = {
        "ids": ids[None],
        "rows": np.full((1, len(ids)), -1, np.int64),
        "features": np.zeros((1, width), np.float32),
        "start": np.asarray([start], np.int64),
        "score": score[None],
    }
    found = session._lm.run(inputs, state)["logits"][0]  # type: ignore[arg-type]
    return np.asarray(found, np.float32)


def _normal(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


class Reference:
    """The float engine's log probabilities of all windows, kept in a file while others are read."""

    def __init__(self, engine: Path, windows: Array, file: Path) -> None:
        self._windows, self._file = windows, file
        with Session.open(engine, threads=1) as session:
            shape = (len(windows), windows.shape[1] - 1, session.model.lm.config.vocab_size)
            self._kept = np.lib.format.open_memmap(file, "w+", np.float32, shape)
            for number, window in enumerate(windows):
                self._kept[number] = at_once(session, window)

    def compare(self, engine: Path, read: Read) -> Score:
        """What an engine, read by at_once or as_run, costs. Positions are the last that it gives.

        The float engine's own score compares it with itself.
        """
        with Session.open(engine, threads=1) as session:
            return self.score(read(session, window) for window in self._windows)

    def score(self, found: Iterable[Array]) -> Score:
        """The same of log probabilities [positions, vocab] for each window."""
        sums = []
        for window, kept, given in zip(self._windows, self._kept, found, strict=True):
            plain, targets = np.asarray(kept[-len(given) :]), window[-len(given) :]
            at = np.arange(len(given))
            same = (plain.argmax(-1) == given.argmax(-1)).mean()
            kl = (np.exp(plain) * (plain - given)).sum(-1, dtype=np.float64).mean()
            sums.append((-plain[at, targets].mean(), -given[at, targets].mean(), kl, same))
        table = np.asarray(sums, np.float64)
        before, after, kl, same = table.mean(0)
        growth = float(np.exp(after - before) - 1)
        error = (1 + growth) * (table[:, 1] - table[:, 0]).std(ddof=1) / len(table) ** 0.5
        tokens = len(at) * len(table)
        return Score(tokens, float(np.exp(after)), growth, float(error), float(kl), float(same))

    def close(self) -> None:
        """Remove the file."""
        del self._kept
        self._file.unlink()


# -- questions -----------------------------------------------------------------------------------


def answers(engine: Path) -> list[str]:
    """Greedy answers to QUESTIONS, by the language model's own chat template, without an image."""
    with Session.open(engine, threads=1) as session:
        return [
            session.answer(Question(question, max_tokens=ANSWER)).text.strip()
            for question in QUESTIONS
        ]


def right(texts: Iterable[str]) -> int:
    """How many answers have their word, as a word of its own."""
    pairs = zip(QUESTIONS.values(), texts, strict=True)
    return sum(re.search(rf"\b({word})\b", text, re.IGNORECASE) is not None for word, text in pairs)


def changed(said: Mapping[str, Iterable[str]]) -> list[str]:
    """A line for each answer that is not float's."""
    plain = list(said["float"])
    lines = []
    for name, texts in said.items():
        for question, before, after in zip(QUESTIONS, plain, texts, strict=True):
            if before != after:
                lines.append(f"{name}: {question} {before!r} -> {after!r}")
    return lines
