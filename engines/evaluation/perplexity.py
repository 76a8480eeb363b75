"""Perplexity: exp of the mean negative log probability of a text's tokens, in windows.

The text is cut into windows of N tokens, without a token that begins a text; the last incomplete
window is left out. Every token of a window but its first is predicted from those before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgevlm.engines.evaluation import other
from edgevlm.engines.evaluation.tasks import Request, Scores, with_defaults
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.prompts import PromptSequence

WINDOW = 256


def run(request: Request) -> Scores:
    """`perplexity` of `tokens` predicted tokens; beside another engine also `kl` (mean, in nats),
    `top1` (how often the likeliest token is the same) and `perplexity_against`.
    """
    request = with_defaults(request, window=WINDOW)
    assert request.text is not None and request.window is not None
    content = _content(request.text)
    used, file = {"window": request.window}, (request.text,)
    if request.against is None:
        with Session.open(request.engine, threads=request.threads) as session:
            cut = _windows(session, content, request)
            found = _table(session, None, cut, request)
        values = _values(found, len(cut))
        return Scores(values, tuple(_lines(values)), file, used)
    with other.opened(request) as (session, beside):
        cut = _windows(session, content, request)
        found = _table(session, beside, cut, request)
    values = _values(found, len(cut))
    values |= {
        "perplexity_against": round(float(np.exp(found[:, 1].mean())), 6),
        "kl": float(f"{found[:, 2].mean():.6g}"),
        "top1": round(float(found[:, 3].mean()), 6),
    }
    return Scores(values, tuple(_lines(values)), file, used)


def _values(found: Array, windows: int) -> dict[str, float]:
    perplexity = round(float(np.exp(found[:, 0].mean())), 6)
    return {"perplexity": perplexity, "tokens": len(found), "windows": windows}


def _lines(values: dict[str, float]) -> Iterator[str]:
    yield f"perplexity  {values['perplexity']:.4g} ({values['tokens']:,} tokens)"
    if "kl" in values:
        yield f"against     {values['perplexity_against']:.4g}"
        yield f"kl          {values['kl']:.3g} nats"
        yield f"top-1       {values['top1']:.1%} the same"


def _content(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{file} is no text in UTF-8") from None
    except OSError as refused:
        raise InputError(f"{file} cannot be read: {refused.strerror}") from None


def _windows(session: Session, content: str, request: Request) -> Array:
    """Token ids, int64 [windows, N]. Raises InputError for too short a text or too long windows."""
    window, context = request.window, session.engine.context
    assert window is not None
    if window > context:
        raise InputError(
            f"--window {window} does not fit into the engine's context of {context}",
            hint=f"choose at most {context}",
        )
    ids = session.tokenizer.encode(content, special=False)
    count = min(len(ids) // window, request.limit or len(ids))
    if not count:
        raise InputError(
            f"{request.text} has {len(ids)} tokens, less than one window of {window}",
            hint="give a longer text, or a smaller --window",
        )
    return np.asarray(ids[: count * window], np.int64).reshape(count, window)


def _table(session: Session, beside: Session | None, windows: Array, request: Request) -> Array:
    """A row per predicted token: its negative log probability; beside another engine also that
    engine's, the divergence, and whether the likeliest token is the same.
    """
    rows = []
    for number, window in enumerate(windows, 1):
        sequence = PromptSequence(window[None], np.full((1, len(window)), -1, np.int64))
        others = None if beside is None else _pieces(beside, sequence)
        rows.append(_rows(_pieces(session, sequence), others, window))
        if number % 8 == 0 or number == len(windows):
            request.progress(f"{number} of {len(windows)} windows")
    return np.concatenate(rows)


def _pieces(session: Session, sequence: PromptSequence) -> Iterator[Array]:
    """Log probabilities [n, vocab] after the positions of a window, in order."""
    width: int = session.model.lm.config.hidden_size
    nothing = np.zeros((1, width), np.float32)
    for logits in session.score(sequence, nothing, session.new_state()):
        yield other.log_probabilities(np.asarray(logits, np.float32))


def _rows(pieces: Iterator[Array], others: Iterator[Array] | None, window: Array) -> Array:
    found, at = [], 0
    for piece in pieces:
        beside = None if others is None else next(others)
        targets = window[at + 1 : at + 1 + len(piece)]
        at += len(piece)
        index = np.arange(len(targets))
        columns = [-piece[index, targets]]
        if beside is not None:
            kl, same = other.divergence(beside[: len(targets)], piece[: len(targets)])
            columns += [-beside[index, targets], kl, same]
        found.append(np.stack([np.asarray(c, np.float64) for c in columns], 1))
    return np.concatenate(found)
