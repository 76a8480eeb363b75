"""Agreement: the same prompts to two engines, token for token and as distributions.

`exact` and `same_prefix` compare the greedy answers. `top1` and `kl` compare what both say next at
every position of the other engine's answer, so that one early difference does not count twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgevlm.engines.evaluation import other
from edgevlm.engines.evaluation.tasks import Request, Scores, with_defaults
from edgevlm.engines.runtime import request_file
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.terminal.console import table

MAX_TOKENS = 32
# Asked where no file is given: each with a drawn image of its own.
PROMPTS = (
    "What is shown in this image?",
    "Describe the image in detail.",
    "Which colors are in this image?",
    "How many objects are there? Answer with a number.",
    "Where is the brightest part of the image?",
    "Write a short title for this image.",
    "Is this a photograph or a drawing? Give a reason.",
    "List three things that one could ask about this image.",
)


@dataclass(frozen=True)
class Compared:
    """One prompt: tokens of both answers; kl and top1 at each position of the other's."""

    tokens: int
    other_tokens: int
    same_prefix: int
    exact: bool
    kl: Array
    top1: Array


def run(request: Request) -> Scores:
    """`prompts`, `exact` (share of answers that are equal), `same_prefix` (share of the other's
    tokens before the first difference), `top1`, `kl` and `kl_max` (nats).
    """
    request = with_defaults(request, max_tokens=MAX_TOKENS, template="auto")
    questions = _questions(request)
    with other.opened(request) as (engine, beside):
        found = []
        for number, question in enumerate(questions, 1):
            found.append(compare(engine, beside, question))
            request.progress(f"{number} of {len(questions)} prompts")
    kl = np.concatenate([one.kl for one in found])
    top1 = np.concatenate([one.top1 for one in found])
    tokens = sum(one.other_tokens for one in found)
    values = {
        "prompts": len(found),
        "tokens": tokens,
        "exact": round(sum(one.exact for one in found) / len(found), 6),
        "same_prefix": round(sum(one.same_prefix for one in found) / tokens, 6),
        "top1": round(float(top1.mean()), 6),
        "kl": float(f"{kl.mean():.6g}"),
        "kl_max": float(f"{kl.max():.6g}"),
    }
    used = {"max_tokens": request.max_tokens, "template": request.template}
    files = () if request.data is None else (request.data,)
    return Scores(values, tuple(_lines(found, values)), files, used)


def _lines(found: Sequence[Compared], values: dict[str, float]) -> list[str]:
    rows = [
        (n, one.tokens, one.other_tokens, one.same_prefix, one.top1.mean(), one.kl.mean())
        for n, one in enumerate(found, 1)
    ]
    columns = ("prompt", "tokens", "of the other", "same prefix", "same top-1", "kl")
    return [
        *table(columns, [tuple(map(float, row)) for row in rows]),
        "",
        f"equal answers   {values['exact']:.1%} of {values['prompts']}",
        f"same prefix     {values['same_prefix']:.1%} of {values['tokens']} tokens",
        f"same top-1      {values['top1']:.1%}",
        f"kl              {values['kl']:.3g} nats, at most {values['kl_max']:.3g}",
    ]


def compare(engine: Session, beside: Session, question: Question) -> Compared:
    """One prompt, asked of both."""
    theirs = beside.answer(question).token_ids
    ours = engine.answer(question).token_ids
    pairs = zip(ours, theirs, strict=False)
    prefix = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    wanted = other.log_probabilities(_following(beside, question, theirs))
    given = other.log_probabilities(_following(engine, question, theirs))
    kl, top1 = other.divergence(wanted, given)
    return Compared(len(ours), len(theirs), prefix, ours == theirs, kl, top1)


def _following(session: Session, question: Question, tokens: Sequence[int]) -> Array:
    """Logits [len(tokens), vocab] after the prompt and after each given token but the last."""
    sequence, features = session.ask(question).read()
    state = session.new_state()
    rows = [session.prefill(sequence, features, state).copy()]
    for number, token in enumerate(tokens[:-1]):
        rows.append(session.decode(token, sequence.length + number, state).copy())
    return np.asarray(np.stack(rows), np.float32)


def _questions(request: Request) -> list[Question]:
    """From the request file, or the built-in ones. Raises InputError for a line that is wrong."""
    assert request.max_tokens is not None
    given = Question("", (), request.max_tokens, template=request.template or "auto")
    if request.data is None:
        prompts = PROMPTS[: request.limit]
        return [
            Question(text, _drawn(number), request.max_tokens, template=given.template)
            for number, text in enumerate(prompts)
        ]
    requests = request_file.gather(given, Path(request.data))[: request.limit]
    refused = next((one.refused for one in requests if one.refused is not None), None)
    if refused is not None:
        raise InputError(refused.message, hint=refused.hint)
    return [one.question for one in requests if one.question is not None]


def _drawn(number: int) -> Array:
    """A picture of a disk and a rectangle on a gradient, uint8 [240, 320, 3]."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[0:240, 0:320].astype(np.float64)
    colors = random.integers(0, 256, (4, 3)).astype(np.float64)
    share = ((x / 320 + y / 240) / 2)[..., None]
    image = colors[0] * share + colors[1] * (1 - share)
    cx, cy, radius = random.integers(60, 260), random.integers(60, 180), random.integers(25, 60)
    image[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = colors[2]
    left, top = random.integers(0, 220), random.integers(0, 160)
    image[top : top + 60, left : left + 80] = colors[3]
    return np.asarray(image, np.uint8)
