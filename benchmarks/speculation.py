"""Guessing tokens (`--speculate`): what it brings where a text repeats itself, and elsewhere.

SmolLM2-135M-Instruct, whose trained weights come inside a Python package (benchmarks/trained.py),
answers greedily, one answer at a time, in several number formats: copying lines as they are read
from documents, lists of boxes and a table, and free questions. Every question is answered with and
without guesses, in turn. Time runs from the first token of an answer to its last one, in processor
seconds of one thread, which other programs hardly change; --wall: seconds, for a quiet machine and
several threads.

Bars: in float no token changes, copying gains a third, and nothing loses more than a twentieth.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks import trained_models as models
from benchmarks.common import Bar, Report, parser, wait_until_quiet, workplace
from edgevlm import Question, Session
from edgevlm.engines.serving.job import Ended, Event, Failed, Job
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.scheduler import Counts, Scheduler

FORMS = ("float", "int8", "int8-rows", "int4")
RECEIPT = """Green Valley Market, receipt 20417
Tomatoes 1.2 kg 3.59 EUR
Potatoes 2.5 kg 2.75 EUR
Olive oil 0.5 l 6.99 EUR
Total 13.33 EUR"""
LETTER = """Dear Mrs. Miller, your parcel 88-1204-7 has arrived at our office in Mill Street.
You can fetch it from Monday to Friday, from 9:00 to 18:30. Please bring your passport."""
BOXES = """cup [0.12, 0.30, 0.25, 0.48]
plate [0.30, 0.52, 0.61, 0.70]
spoon [0.64, 0.50, 0.69, 0.72]
cup [0.71, 0.29, 0.84, 0.47]"""
TABLE = """| city | 2022 | 2023 | 2024 |
|---|---|---|---|
| Rome | 120 | 131 | 142 |
| Oslo | 98 | 99 | 101 |
| Lima | 77 | 85 | 93 |"""
KINDS: Mapping[str, tuple[str, ...]] = {
    "copied": tuple(
        f"Repeat this text exactly, word for word:\n\n{text}"
        for text in (RECEIPT, LETTER, BOXES, TABLE)
    ),
    "free": (
        "Why is the sky blue?",
        "Tell me a short story about a dog and a lighthouse.",
        "How do I make a good cup of tea?",
        "Describe a city at night.",
    ),
}
LEAST, COSTS = 1.33, 0.95  # bars


@dataclass
class Total:
    """Of several answers: tokens after the first ones, and the seconds that they took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class Asking:
    """One way of answering: a session with or without guesses."""

    def __init__(self, session: Session, speculate: bool, clock: Callable[[], float]) -> None:
        self._session, self._clock = session, clock
        limits = Limits(slots=1, queue=1)
        self._scheduler = Scheduler(session, limits, speculate=speculate)
        self.total, self.answers = Total(), list[tuple[int, ...]]()

    @property
    def counts(self) -> Counts:
        """What the scheduler counted."""
        return self._scheduler.counts

    def ask(self, text: str, tokens: int) -> None:
        """One answer, which is added to what there is."""
        events = SimpleQueue[tuple[float, Event]]()
        question = Question(text, max_tokens=tokens)
        job = Job(self._session, question, lambda event: events.put((self._clock(), event)))
        self._scheduler.submit(job.prepare())
        begin, event = at, _ = events.get()
        while not isinstance(event, Ended):
            if isinstance(event, Failed):
                raise event.error
            at, event = events.get()
        ids = event.answer.token_ids
        self.answers.append(ids)
        self.total.tokens += len(ids) - 1
        self.total.seconds += at - begin

    def close(self) -> None:
        """End the scheduler."""
        self._scheduler.close()


def measure(engine: Path, name: str, options: Namespace, report: Report) -> None:
    """Both kinds of questions on one engine; adds rows and bars."""
    clock = time.perf_counter if options.wall else time.process_time
    with Session.open(engine, threads=options.threads) as session:
        for kind, texts in KINDS.items():
            sides = [Asking(session, speculate, clock) for speculate in (False, True)]
            for number in range(options.rounds):
                for text in texts[number % 2 :: 2] if options.short else texts:
                    for side in sides[:: 1 if number % 2 else -1]:
                        wait_until_quiet(options.patience)
                        side.ask(text, options.tokens)
            add(report, name, kind, sides)
            for side in sides:
                side.close()


def add(report: Report, name: str, kind: str, sides: Sequence[Asking]) -> None:
    """A row of the table, and the bars that concern it."""
    plain, guessing = sides
    same = sum(a == b for a, b in zip(plain.answers, guessing.answers, strict=True))
    counts, gain = guessing.counts, guessing.total.rate / plain.total.rate
    right = counts.right / max(counts.guessed, 1)
    found = {
        "tokens_per_s": round(plain.total.rate, 2),
        "tokens_per_s_guessing": round(guessing.total.rate, 2),
        "gain": round(gain, 3),
        "guessed": counts.guessed,
        "right": counts.right,
        "tokens": counts.output_tokens,
        "answers": len(plain.answers),
        "same_answers": same,
    }
    report.measured[f"{name}, {kind}"] = found
    rates = (found["tokens_per_s"], found["tokens_per_s_guessing"], f"{gain:.2f} x")
    shares = (f"{right:.0%}", f"{counts.right / max(counts.output_tokens, 1):.0%}")
    report.rows.append((name, kind, *rates, *shares, f"{same} of {len(plain.answers)}"))
    if name == "float":
        differing = len(plain.answers) - same
        report.bars.append(Bar(f"float, {kind}: answers that differ", differing, 0.5))
        if kind == "copied":
            report.bars.append(Bar("float, copied: gain", gain, LEAST, at_least=True))
    report.bars.append(Bar(f"{name}, {kind}: with guesses / without", gain, COSTS, at_least=True))


def engines(options: Namespace, work: Path) -> dict[str, Path]:
    """By name: those that are given, or SmolLM2's in every form."""
    if options.engine:
        return {folder.name: folder for folder in options.engine}
    if reason := models.lacks(work):
        sys.exit(f"speculation: {reason}")
    calibrating = models.text(work).calibrating
    return {name: models.engine(work, name, "", calibrating).folder for name in options.forms}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold."""
    command_line = parser(__doc__)
    command_line.add_argument("--engine", type=Path, action="append", help="repeatable")
    command_line.add_argument("--forms", nargs="+", default=FORMS, choices=models.FORMS)
    command_line.add_argument("--tokens", type=int, default=96, help="of an answer")
    command_line.add_argument("--rounds", type=int, default=2)
    command_line.add_argument("--threads", type=int, default=1)
    command_line.add_argument("--wall", action="store_true", help="seconds of the wall's clock")
    command_line.add_argument("--short", action="store_true", help="half of the texts a round")
    command_line.add_argument("--patience", type=float, default=0.0, help="wait for quiet, s")
    options: Any = command_line.parse_args(arguments)
    columns = ("engine", "text", "tokens/s", "guessing", "", "guesses right", "of the tokens")
    report = Report("speculation", (*columns, "same answers"), ("edgevlm", "onnxruntime"))
    with workplace(options) as work:
        for name, engine in engines(options, work).items():
            print(f"speculation: {name}", file=sys.stderr, flush=True)
            measure(engine, name, options, report)
    return 0 if report.finish(options) else 1


if __name__ == "__main__":
    sys.exit(main())
